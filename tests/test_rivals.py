"""The rivals' verdicts at one radius are those of their radii."""

import pytest
import torch

import crcbook as crc
from crcbook.certificate.rivals import RIVALS, rival_robust


@pytest.fixture(scope="module")
def trained(digits):
    """A network that both bounds certify something of, and test items."""
    model = crc.mlp([64, 24, 16, 10], "tanh", seed=0)
    recipe = crc.Recipe("crown-ibp", radius=0.5, epochs=12, batch_size=64, ramp_epochs=6)
    crc.train(model, digits.train, recipe)
    return model, digits.test.take(slice(0, 230))


@pytest.mark.parametrize("rival", RIVALS)
def test_a_ball_is_proved_where_the_radius_is(trained, rival):
    model, test = trained
    radius = crc.certify(model, test.x, test.y, method=rival).radius
    ball = radius[radius > 0].median().item()
    robust = rival_robust(model, test.x, test.y, ball, rival)
    decided = (radius - ball).abs() > 1e-3 * ball  # where the search for a radius stops
    assert torch.equal(robust[decided], (radius >= ball)[decided])
    assert robust.any() and not robust.all()


@pytest.mark.parametrize("rival", RIVALS)
def test_no_attack_lands_in_a_proved_ball(trained, rival):
    model, test = trained
    radius = crc.certify(model, test.x, test.y, method=rival).radius.quantile(0.7).item()
    robust = rival_robust(model, test.x, test.y, radius, rival)
    assert robust.any()
    assert not crc.attack(model, test.x[robust], test.y[robust], radius=radius).success.any()


def test_an_item_does_not_depend_on_its_batch(trained):
    model, test = trained
    whole = rival_robust(model, test.x, test.y, 0.3, "crown")
    alone = [rival_robust(model, test.x[i : i + 1], test.y[i : i + 1], 0.3, "crown")
             for i in (0, 199, 200, 229)]  # fmt: skip
    assert torch.equal(whole[[0, 199, 200, 229]], torch.cat(alone))


def test_a_misclassified_item_is_never_robust(trained):
    model, test = trained
    wrong = (test.y + 1) % 10
    for rival in RIVALS:
        answers = model(test.x).argmax(1)
        assert not rival_robust(model, test.x, wrong, 1e-3, rival)[answers != wrong].any()


def test_mistakes_are_explained(trained):
    model, test = trained
    with pytest.raises(ValueError, match="rival must be one of crown, lipschitz; got 'ibp'"):
        rival_robust(model, test.x, test.y, 0.3, "ibp")
    with pytest.raises(ValueError, match="radius"):
        rival_robust(model, test.x, test.y, -1.0, "crown")
