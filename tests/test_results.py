"""What results say of themselves, in a few lines."""

import numpy as np
import pytest
import torch
from torch import nn

import crcbook as crc


@pytest.fixture(scope="module")
def certificate(digits, digits_model):
    part = digits.test.take(slice(0, 60))
    return crc.certify(digits_model, part.x, part.y)


def test_a_certificate_knows_its_accuracy_at_any_radii(certificate, digits, digits_model):
    part = digits.test.take(slice(0, 60))
    radii = [0.0, 0.2, 0.5, 1.0, 50.0]
    found = certificate.certified_accuracy(radii)
    assert found.shape == (5,) and found.dtype == torch.float64
    for radius, accuracy in zip(radii[1:], found[1:], strict=True):
        assert accuracy == (certificate.radius >= radius).double().mean()
    clean = (digits_model(part.x).argmax(1) == part.y).double().mean()
    assert found[0] == clean and found[-1] == 0 and (found.diff() <= 0).all()
    assert certificate.certified_accuracy(0.5) == found[2]
    assert certificate.certified_accuracy(np.array([[0.2], [0.5]])).tolist() == [
        [found[1]], [found[2]],
    ]  # fmt: skip
    for radii, error in ((-1, ValueError), ([0.1, torch.nan], ValueError), ("a", TypeError)):
        with pytest.raises(error, match="radii must be"):
            certificate.certified_accuracy(radii)


def test_a_misclassified_item_is_certified_at_no_radius():
    model, x = crc.mlp([3, 5, 2], seed=0), torch.zeros(1, 3)
    wrong = crc.certify(model, x, 1 - model(x).argmax(1))
    assert wrong.certified_accuracy(0.0) == 0


def test_results_are_shown_in_a_few_lines(certificate, digits, digits_model):
    part = digits.test.take(slice(0, 60))
    verdict = crc.verify(digits_model, part.x, part.y, 0.5)
    for result in (certificate, verdict, crc.attack(digits_model, part.x, part.y, 0.5)):
        text = repr(result)
        assert len(text) < 600 and text.count("\n") < 7 and "60 items" in text
        assert str(result) == text
    shown = repr(certificate)
    assert f"exact {int((certificate.exact & (certificate.radius > 0)).sum())}" in shown
    assert f"{certificate.radius[certificate.radius > 0].mean():.4g} on average" in shown
    assert f"robust        {int(verdict.robust.sum())}\n" in repr(verdict)
    assert "balls of radius 0.5\n" in repr(verdict)
    only = crc.certify(digits_model, part.x, part.y, targets="runner-up")
    assert "the runner-up alone" in repr(only)


@pytest.mark.parametrize("count", [1, 3])
def test_results_of_nothing_certified_and_of_no_limit_are_shown_too(count):
    constant = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        constant[0].weight.zero_()
        constant[0].bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.zeros(count, 2)
    assert f"at any radius {count}" in repr(crc.certify(constant, x))
    assert "certified     0, at an l2 radius of none" in repr(crc.certify(constant, x, [1] * count))
    assert f"misclassified {count}\n" in repr(crc.certify(constant, x, [1] * count))
    attacked = repr(crc.attack(constant, x, [1] * count))
    assert f"{count} adversarial, of which {count} as they are (fields" in attacked
    refuted = repr(crc.verify(constant, x, [1] * count, 1.0))
    assert f"refuted       {count}" in refuted and "undecided     0" in refuted


def test_a_large_gap_says_what_may_help():
    model = crc.mlp([5, 10, 10, 10, 3], "sigmoid", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    x = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    loose = crc.certify(model, x)
    wide = int((loose.radius < 0.8 * loose.distance).sum())
    assert wide > 2 and loose.hint.startswith(f"{wide} of 8 are far from what an attack finds: ")
    assert 'curvature="local" or box=' in loose.hint and repr(loose).endswith(loose.hint)
    assert 'method="best"' in crc.certify(model, x, method="closed-form").hint
    tight = crc.certify(model, x, box=(0.0, 1.0), curvature="local")
    assert not tight.hint or "crcbook.train" in tight.hint
    verdict = crc.verify(model, x, radius=1.01 * loose.radius)
    undecided = ~verdict.robust & verdict.nearest.isnan().any(1)
    assert undecided.any() and f"{int(undecided.sum())} of 8 are far" in verdict.hint


def test_an_exact_certificate_has_no_advice():
    exact = crc.certify(crc.mlp([3, 2], seed=0), torch.rand(4, 3))
    assert exact.exact.all() and exact.hint == ""
