"""Bounds that follow the curvature outward hold everywhere in the ball, and nearly touch."""

import pytest
import torch
from conftest import EVERY, SMOOTH, bent_lines, margin_hessian, random_networks
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.attacks import Aim, descend
from crcbook.networks import read_network
from crcbook.proof.box import Box
from crcbook.proof.paths import Neighbourhood
from crcbook.proof.prover import Entries, Prover

ZERO, ONE = torch.tensor([0]), torch.tensor([1])


def margin_in_ball(model, x, radius, label=ZERO, target=ONE, allowed=None):
    """The bound of a margin in the ball around one input."""
    prover = Prover.of(read_network(model))
    place = Neighbourhood.of(prover, x, radius, allowed)
    return place.margin(Entries.of(prover, x[None], label, target, allowed))


def ball(x, radius, generator, points=20):
    noise = torch.randn(points, len(x), generator=generator, dtype=torch.float64)
    length = torch.rand(points, 1, generator=generator, dtype=torch.float64)
    return x + radius * length * torch.nn.functional.normalize(noise, dim=1)


@given(random_networks(activations=EVERY), st.sampled_from([0.01, 0.3, 2.0, 10.0]))
def test_no_point_of_the_ball_is_below_the_bound(case, radius):
    model, generator = case
    x = torch.randn(model[1].in_features, generator=generator, dtype=torch.float64)
    bound = margin_in_ball(model, x, radius)
    network = read_network(model)
    points = ball(x, radius, generator)
    starts = torch.cat([x[None], points])
    pair = ZERO.expand(len(starts)), ONE.expand(len(starts))
    centres = x.expand(len(starts), -1)
    _, reached = descend(Aim(network, centres, *pair), radius, starts)
    logits = network.logits(torch.cat([points, x[None]]))
    lowest = torch.cat([reached, logits[:, 0] - logits[:, 1]]).min()
    assert bound <= lowest + 1e-12 * (1 + logits.abs().max())


@given(random_networks(activations=EVERY), st.sampled_from([0.1, 1.0]))
def test_in_a_box_only_its_points_count(case, radius):
    model, generator = case
    x = torch.rand(model[1].in_features, generator=generator, dtype=torch.float64)
    box = Box(torch.zeros_like(x), torch.ones_like(x))
    bound = margin_in_ball(model, x, radius, allowed=box.around(x[None]))
    points = ball(x, radius, generator)
    _, reached = descend(
        Aim(read_network(model), x.expand(20, -1), ZERO.expand(20), ONE.expand(20), box),
        radius,
        box.clip(points),
    )
    logits = read_network(model).logits(box.clip(points))
    lowest = torch.cat([reached, logits[:, 0] - logits[:, 1]]).min()
    assert bound <= lowest + 1e-12 * (1 + logits.abs().max())


@pytest.mark.parametrize("radius", [0.3, 1.0, 3.0])
def test_on_a_line_the_worst_point_of_the_ball_is_no_worse_than_the_bound(radius):
    for model, x in bent_lines(108):
        points = x + radius * torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None]
        logits = model(points).detach()
        margin = (logits[:, 0] - logits[:, 1]).min()
        assert margin_in_ball(model, x, radius) <= margin + 1e-9 * (1 + margin.abs())


@pytest.mark.parametrize("hidden", [[30], [30, 30], [30, 30, 30]])
@pytest.mark.parametrize("activation", SMOOTH)
def test_in_a_small_ball_the_bound_is_the_second_order_minimum(activation, hidden):
    model = crc.mlp([5, *hidden, 3], activation, seed=1).double()
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    network = read_network(model)
    value, gradient = network.margin_and_gradient(x[None], ZERO, ONE)
    curvature = -torch.linalg.eigvalsh(margin_hessian(model, x, 0, 1))[0]
    first_order = value.item() - 1e-3 * gradient.norm().item()
    bound = margin_in_ball(model, x, 1e-3).item()
    # Deeper terms count where they bend down only, so up to their size is lost; all of it is of
    # the second order.
    allowed = curvature.clamp(min=0).item() + (1e-3 if len(hidden) == 1 else 0.5)
    assert first_order - allowed * 1e-6 <= bound <= first_order + 1e-6


def test_following_the_curvature_beats_one_number_for_the_ball(digits):
    model = crc.mlp([64, 32, 32, 10], seed=0)
    crc.train(model, digits.train, crc.Recipe("standard", epochs=10, batch_size=64))
    network = read_network(model)
    x = digits.test.x[:8].flatten(1).double()
    label = network.logits(x).argmax(1)
    target = network.logits(x).argsort(1)[:, -2]
    value, gradient = network.margin_and_gradient(x, label, target)
    k = -crc.curvature_bounds(model, label, target, x=x, radius=0.5)[0]
    plain = value - 0.5 * gradient.norm(dim=1) - k * 0.5**2 / 2
    for i in range(8):
        margin = margin_in_ball(model, x[i], 0.5, label[i : i + 1], target[i : i + 1])
        assert margin > plain[i] + 0.1 * k[i] * 0.5**2 / 2


@pytest.mark.parametrize("power", [-40, 40])
def test_the_unit_of_the_inputs_does_not_matter(power):
    model = crc.mlp([4, 10, 9, 3], "tanh", seed=3).double()
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)
    bound = margin_in_ball(model, x, 0.5).item()
    with torch.no_grad():
        model[1].weight.mul_(2.0**power)
    scaled = margin_in_ball(model, x / 2.0**power, 0.5 / 2.0**power)
    assert scaled.item() == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e49])
def test_weights_of_any_size_give_a_bound_or_none(scale):
    model = crc.mlp([4, 6, 5, 3], seed=3).double()
    with torch.no_grad():
        model[1].weight.mul_(scale)
    x = torch.ones(4, dtype=torch.float64)
    bound = margin_in_ball(model, x, 0.1)
    logits = read_network(model).logits(ball(x, 0.1, torch.Generator().manual_seed(0)))
    assert not bound.isnan()
    assert bound <= (logits[:, 0] - logits[:, 1]).min() + 1e-12 * (1 + logits.abs().max())
