"""What the chapters show of the proofs' inner workings."""

import numpy as np
import pytest
import torch

import crcbook as crc
from crcbook.book.demos import (
    certified_regions,
    dual_at,
    local_margins,
    margins_in_balls,
    radii_of_a_guess,
    radii_where_positive,
    radii_with,
    slab_radii,
    spectrum_at,
    trained_at,
)

BOX = (torch.tensor([-1.0, -0.5]), torch.tensor([2.0, 0.5]))
RADII = np.linspace(0.1, 1.5, 8)


def test_the_dual_is_the_minimum_over_a_grid_and_never_beyond_the_boundary(unit_model):
    x = np.linspace(-1, 3, 400_001)
    boundary = np.log(np.e**2 - 1) / 2
    for eta in (0.0, 0.3, 0.536, 0.9):
        found = dual_at(unit_model, [0.0, 0.7], eta)
        lowest = (x**2 / 2 + eta * (2 - np.logaddexp(0, 2 * x))).min()
        assert found.value == pytest.approx(lowest, abs=1e-9)
        assert found.radius <= boundary + 1e-12
    assert dual_at(unit_model, [0.0, 0.7], 0.536).radius == pytest.approx(boundary, abs=1e-4)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_the_dual_refuses_a_multiplier_out_of_range(unit_model, eta):
    with pytest.raises(ValueError, match="eta must be"):
        dual_at(unit_model, [0.0, 0.0], eta)


def test_the_spectrum_of_one_unit_is_one_eigenvalue(unit_model):
    found = spectrum_at(unit_model, torch.tensor([0.0, 5.0]), 0, 1)
    assert found.eigenvalues == pytest.approx([-1.0, 0.0], abs=1e-12)
    assert found.lowest == pytest.approx(-1.0) and found.lowest <= -1.0
    assert found.highest == pytest.approx(0.0, abs=1e-9)
    assert spectrum_at(unit_model, torch.tensor([1.0, 0.0]), 0, 1).eigenvalues[0] > -1.0


@pytest.mark.parametrize("eta", [0.1, 0.54, 0.95])
def test_a_guess_never_proves_more_than_the_dual_and_claims_no_less(eta):
    xs = np.linspace(-3, 3, 60_001)
    dual = (xs**2 / 2 + eta * (2 - np.logaddexp(0, 2 * xs))).min()
    for steps in (0, 1, 5, 200):
        guess = radii_of_a_guess(eta, steps)
        assert (
            guess.proved <= np.sqrt(2 * dual) + 1e-8 and guess.claimed >= np.sqrt(2 * dual) - 1e-8
        )
    assert guess.proved == pytest.approx(guess.claimed, abs=1e-9)


def test_the_four_regions_grow_and_stay_in_the_box():
    model = crc.mlp([2, 16, 2], seed=0)
    with torch.no_grad():
        model[1].weight.mul_(4)
    regions = certified_regions(model, 0.3, 0.2, BOX)
    radius = {name: r for name, (_, r) in regions.items()}
    assert 0 < radius["global"] <= min(radius["local"], radius["global + box"])
    assert max(radius["local"], radius["global + box"]) <= radius["local + box"]
    for name, (outline, r) in regions.items():
        assert (np.linalg.norm(outline - [0.3, 0.2], axis=1) <= r * (1 + 1e-12)).all()
        inside = (outline >= BOX[0].numpy()).all() and (outline <= BOX[1].numpy()).all()
        assert inside or "box" not in name


def test_a_box_without_a_boundary_is_certified_whole(line_model):
    away = torch.tensor([0.5, -1.0]), torch.tensor([1.5, 1.0])  # the boundary is at 0.25
    outline, radius = certified_regions(line_model, 0.75, 0.0, away)["global + box"]
    assert radius == np.inf
    assert outline.min(0) == pytest.approx([0.5, -1.0]) and outline.max(0) == pytest.approx(
        [1.5, 1]
    )


def test_no_method_claims_more_than_the_margin_at_a_point_inside(digits, digits_model):
    margins = margins_in_balls(digits_model, digits.test.x[3], int(digits.test.y[3]), RADII)
    found = margins.pop("a point inside")
    assert len(margins) == 5
    assert all((values <= found + 1e-9).all() for values in margins.values())
    assert (margins["closed form"] <= margins["dual"]).all()


def test_the_margins_in_balls_are_below_those_at_random_points():
    model = crc.mlp([4, 8, 6, 3], "tanh", seed=3).double()
    x = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = int(model(x[None]).argmax())
    steps = torch.randn(4000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i, values in enumerate(
        zip(*margins_in_balls(model, x, label, RADII).values(), strict=True)
    ):
        logits = model(x + RADII[i] * torch.nn.functional.normalize(steps, dim=1)).detach()
        margin = (logits[:, [label]] - logits).scatter(1, torch.full((4000, 1), label), torch.inf)
        assert max(values[:-1]) <= margin.min().item()


def test_a_linear_margin_falls_to_zero_at_its_distance(line_model):
    margins = margins_in_balls(line_model, torch.tensor([0.75, 3.0]), 0, [0.25, 0.49, 0.51])
    assert set(radii_where_positive(margins, [0.25, 0.49, 0.51]).values()) == {0.49}
    nowhere = {"none": np.array([-1.0, -2.0])}
    assert radii_where_positive(nowhere, [0.1, 0.2]) == {"none": 0.0}


def test_the_margins_in_a_ball_come_closer_to_the_attack(digits, digits_model):
    x, y = digits.test.x[0], int(digits.test.y[0])
    margins = local_margins(digits_model, x, y, (y + 1) % 10, 0.3)
    whole, ball, followed, attack = margins.values()
    assert whole <= ball <= followed <= attack + 1e-9
    assert local_margins(digits_model, x, y, (y + 1) % 10, 0.1)["attack"] > attack


def test_radii_with_our_curvature_are_those_of_certificates(digits, digits_model):
    x, y = digits.test.x[:20], digits.test.y[:20]
    label, target = (1 - torch.eye(10)).nonzero().T
    k = torch.zeros(10, 10, dtype=torch.float64)
    k[label, target] = -crc.curvature_bounds(digits_model, label, target)[0]
    ours = crc.certify(digits_model, x, y, method="dual").radius
    found = radii_with(digits_model, x, y, k)
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=0)
    closed = crc.certify(digits_model, x, y, method="closed-form").radius
    torch.testing.assert_close(
        radii_with(digits_model, x, y, k, steps=0), closed, rtol=1e-5, atol=0
    )
    assert (radii_with(digits_model, x, y, 9 * k) <= (1 + 1e-9) * found).all()


def test_radii_of_slabs_stay_below_the_attack_and_gain_from_more(digits, digits_model):
    x, y = digits.test.x[:10], digits.test.y[:10]
    sure = digits_model(x).argmax(1) == y
    x, y = x[sure], y[sure]
    radii = []
    for slabs in (1, 8):
        radius, reached = slab_radii(digits_model, x, y, (y + 1) % 10, slabs)
        assert (radius > 0).all() and not (radius > reached).any()
        radii.append(radius)
    assert radii[1].mean() > radii[0].mean()


def test_a_larger_price_trains_a_network_of_less_curvature():
    data = crc.load("moons").train
    bends = [
        -crc.curvature_bounds(trained_at(data, gamma, 0.2, epochs=10), 0, 1)[0].item()
        for gamma in (0.0, 0.1)
    ]
    assert bends[1] < bends[0]
