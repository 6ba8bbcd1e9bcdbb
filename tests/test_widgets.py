"""The live widget recomputes its certificates; its callback is a plain function."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import crcbook as crc
from crcbook.book import widgets
from crcbook.book.explorer import radius_field
from crcbook.book.widgets import (
    attack_at,
    describe,
    describe_item,
    describe_training,
    live_attack,
    live_ball,
    live_certificate,
    live_dual,
    live_explorer,
    live_guess,
    live_regions,
    live_rivals,
    live_spectrum,
    live_training,
    show,
)

ENDS = (-1.0, 1.0)


def test_the_callback_certifies_the_point_it_is_given(line_model):
    point = radius_field(line_model, [0.75], [3.0])
    assert point.radius.item() == pytest.approx(0.5, rel=1e-6)
    assert point.predicted.item() == 0
    assert point.nearest[0, 0] == pytest.approx([0.25, 3.0], abs=1e-5)


def test_the_description_rounds_to_the_safe_side(line_model):
    text = describe(radius_field(line_model, [0.74999], [0.0]))
    assert (
        text
        == "Certified radius 0.499 around a point of class 0: exactly the distance to the boundary."
    )


@pytest.fixture
def dome_model():
    """A margin certified to 1.27 at the origin, with its boundary 1.446 away."""
    model = crc.mlp([2, 2, 2]).double()
    model[1].weight.data = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    model[3].weight.data = torch.tensor([[-1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    model[1].bias.data.zero_()
    model[3].bias.data = torch.tensor([3.0, 0.0], dtype=torch.float64)
    return model


def test_the_description_of_a_loose_certificate_names_both_bounds(dome_model):
    text = describe(radius_field(dome_model, [0.0], [0.0]))
    assert text.startswith("Certified radius 1.270 around a point of class 0.")
    assert 1.446 <= float(text.split()[-2]) < 1.46


def test_a_margin_without_a_boundary_is_certain_everywhere(line_model):
    line_model[1].weight.data.zero_()
    assert describe(radius_field(line_model, [0.0], [0.0])) == "Every valid point is class 1."


def test_the_description_does_not_promise_more_than_the_runner_up():
    point = radius_field(crc.mlp([2, 8, 3], seed=1), [0.1], [0.2], targets="runner-up")
    assert "against the runner-up only" in describe(point)


WAYS = {"curvature": {}, "Lipschitz": {"method": "lipschitz"}}


def test_a_slider_computes_a_new_certificate(line_model):
    *_, x_slider, _, text, picture = live_explorer(lambda *_: line_model, ENDS, ENDS).children
    before = text.value, picture.value
    x_slider.value = 0.75
    assert text.value.startswith("Certified radius 0.499")
    assert (text.value, picture.value) != before
    assert "<svg" in picture.value


def test_a_setting_trains_a_new_network(line_model):
    """The one trained with an attack radius of 0.5 or more has its boundary further off."""
    far = crc.mlp([2, 2])
    far.load_state_dict(line_model.state_dict())
    far[1].bias.data = torch.tensor([-0.875, 0.875])
    asked = []

    def model_at(*settings):
        asked.append(settings)
        return far if settings[-1] >= 0.5 else line_model

    activation, method, gamma, radius, *_, text, _ = live_explorer(model_at, ENDS, ENDS).children
    assert "Certified radius 0.249" in text.value
    radius.value = 0.5
    assert "Certified radius 0.874" in text.value
    activation.value, method.value, gamma.value = "tanh", "crt", 0.1
    assert asked[0] == ("softplus", "standard", 0.002, 0.2)
    assert asked[-1] == ("tanh", "crt", 0.1, 0.5) and len(asked) == 5


def test_the_choice_of_a_certificate_changes_the_ball():
    model = crc.mlp([2, 8, 2], seed=1)
    widget = live_explorer(lambda *_: model, ENDS, ENDS, certificates=WAYS)
    *_, way, _, _, text, picture = widget.children
    lipschitz = radius_field(model, [0.0], [0.0], method="lipschitz").radius.item()
    before = text.value
    way.value = "Lipschitz"
    assert text.value != before
    assert f"Certified radius {np.floor(lipschitz * 1e3) / 1e3:.3f}" in text.value
    assert f"Lipschitz {np.floor(lipschitz * 1e3) / 1e3:.3f}" in picture.value


def test_options_reach_certify():
    model = crc.mlp([2, 8, 3], seed=1)
    ways = {"the runner-up": {"targets": "runner-up"}}
    *_, text, _ = live_explorer(lambda *_: model, ENDS, ENDS, certificates=ways).children
    assert "against the runner-up only" in text.value


def test_the_widget_leaves_no_figures_open(line_model):
    plt.close("all")
    data = (torch.zeros(2, 2), torch.tensor([0, 1]))
    live_explorer(lambda *_: line_model, ENDS, ENDS, data=data, certificates=WAYS)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("place", "label", "radius", "said"),
    [
        (0.75, 0, 0.6, "0.60 away lies an image classified as 1"),
        (0.75, 0, 0.4, "radius is 0.499: no attack within 0.40 ever"),
        (0.75, 1, 0.4, "Label 1, but classified as 0 already"),
    ],
)
def test_an_attack_is_told_from_a_proof(line_model, place, label, radius, said):
    x = torch.tensor([place, 0.0], dtype=torch.float64)
    point, text = attack_at(line_model, x, label, radius)
    assert said in text
    assert (point - x).norm() <= radius * (1 + 1e-6)


def test_a_failed_attack_between_the_two_radii_proves_nothing(dome_model):
    """A dome certified to 1.27 and attacked at 1.44: between them, nobody knows."""
    _, text = attack_at(dome_model, torch.zeros(2, dtype=torch.float64), 0, 1.35)
    assert "failed, which proves nothing" in text


def test_a_wider_ball_lets_the_attack_through(digits, digits_model):
    item, radius, text, picture = live_attack(
        digits_model, digits.test.x[:20], digits.test.y[:20], widest=3.0
    ).children
    radius.value = radius.min
    assert "no attack within 0.06 ever succeeds" in text.value
    radius.value = radius.max
    assert "3.00 away lies an image classified as" in text.value
    before = picture.value
    item.value = 3
    assert picture.value != before


def test_one_point_of_a_field_is_the_callbacks(line_model):
    grid = np.linspace(-1, 1, 5)
    field = radius_field(line_model, grid, grid)
    assert radius_field(line_model, [grid[3]], [grid[1]]).radius.item() == field.radius[1, 3]


def test_the_duals_sliders_compute_a_new_value(unit_model):
    plt.close("all")
    share, *_, text, picture = live_dual(unit_model, ENDS, ENDS).children
    before = picture.value
    assert "raise η" in text.value
    share.value = 0.9
    assert "lower η" in text.value
    assert picture.value != before and "<svg" in picture.value
    assert plt.get_fignums() == []


def test_the_spectrums_slider_moves_the_point(unit_model):
    plt.close("all")
    ends = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
    target, place, text, picture = live_spectrum(unit_model, ends, 0, 1).children
    assert list(target.options) == [1]
    before = picture.value
    assert "from -1.000" in text.value
    place.value = 1.0
    assert "from -0.420" in text.value and picture.value != before
    assert plt.get_fignums() == []


def test_the_live_guess_breaks_a_claim_until_its_solver_has_converged():
    _, steps, text = live_guess().children
    assert ": broken" in text.value
    steps.value = 30
    assert ": not broken" in text.value


BOX = (torch.tensor([-1.0, -0.5]), torch.tensor([2.0, 0.5]))


def test_a_slider_moves_the_four_regions(line_model):
    slider, _, text, picture = live_regions(line_model, (0.4, 1.9), (-0.4, 0.4), BOX).children
    before = text.value, picture.value
    slider.value = 0.75
    assert "global 0.499" in text.value and (text.value, picture.value) != before


def test_the_description_of_an_item_says_what_is_known_of_it(line_model):
    far, wrong = torch.tensor([[0.74999, 3.0]]), torch.tensor([[0.0, 0.0]])
    certificate = crc.certify(line_model, far, torch.tensor([0]))
    text = "Label 0, certified radius 0.499 (l2), limited by class 1 (bound: dual)."
    assert describe_item(certificate, far, 0) == f"{text} It is exact."
    certificate = replace(certificate, exact=torch.tensor([False]))
    away = f"{text} The nearest adversarial point found is 0.500 away."
    assert describe_item(certificate, far, 0) == away
    certificate = crc.certify(line_model, wrong, torch.tensor([0]))
    text = "Label 0, classified as 1: there is nothing to certify."
    assert describe_item(certificate, wrong, 0) == text
    line_model[1].weight.data.zero_()
    certificate = crc.certify(line_model, wrong, torch.tensor([1]))
    assert describe_item(certificate, wrong, 1) == "Every valid input is classified as 1."


def test_choosing_an_image_or_a_bound_certifies_anew(digits):
    model, x = crc.mlp([64, 16, 16, 16, 10]), digits.test.x[:4]
    y = model(x).argmax(1)
    item, choice, box, text, picture = live_certificate(model, x, y).children
    seen = {(text.value, picture.value)}
    for control, value in [(item, 2), (box, True), (choice, "local"), (choice, "best")]:
        control.value = value
        seen.add((text.value, picture.value))
    assert len(seen) == 5
    certificate = crc.certify(model, x[2:3], y[2:3], box=(0, 1), method="best")
    assert text.value == describe_item(certificate, x[2:3], y[2].item())


RADII = np.linspace(0.1, 1.5, 8)


def test_the_rivals_answer_to_another_image_and_another_network(digits, digits_model):
    plt.close("all")
    x, y = digits.test.x[:4], digits.test.y[:4]
    models = {"one": digits_model, "another": crc.mlp([64, 8, 10], seed=1)}
    choice, item, text, picture = live_rivals(models, x, y, RADII).children
    seen = {picture.value}
    item.value = 2
    seen.add(picture.value)
    choice.value = "another"
    assert len(seen | {picture.value}) == 3 and "<svg" in picture.value
    assert text.value.startswith(f"Label {y[2]}. Positive up to: intervals")
    assert plt.get_fignums() == []


def test_a_slider_moves_the_ball(digits, digits_model):
    widget = live_ball(digits_model, digits.test.x[:4], digits.test.y[:4])
    _, radius, text, picture = widget.children
    before = picture.value
    radius.value = 0.02
    assert "stays positive" in text.value and picture.value != before


def test_the_description_of_a_training_counts_what_is_correct(line_model):
    x = torch.tensor([[0.75, 0.0], [1.25, 1.0], [0.0, 0.0], [0.0, 0.0]])
    text = describe_training(line_model, crc.Split(x, torch.tensor([0, 0, 0, 0])))
    assert text == "Accuracy 50%; mean certified radius 0.75 where correct."


def test_a_slider_trains_anew():
    data = crc.load("moons").train
    gamma, _, text, picture = live_training(data, ENDS, ENDS, epochs=2).children
    before = picture.value
    gamma.value = 1.0
    assert picture.value != before and text.value.startswith("Accuracy")


def test_a_page_has_a_still_of_what_is_live_elsewhere(monkeypatch):
    displayed, widget = [], live_guess()
    monkeypatch.setattr(widgets, "display", displayed.append)
    monkeypatch.delenv("CRCBOOK_BUILD", raising=False)
    show(widget)
    assert displayed == [widget]
    monkeypatch.setenv("CRCBOOK_BUILD", "1")
    show(widget)
    assert "Claimed radius" in displayed[1].data
