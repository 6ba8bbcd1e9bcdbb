"""Training objectives: no point of a ball is below a worst margin; what is exact comes out so."""

from copy import deepcopy

import pytest
import torch
from conftest import SMOOTH, random_networks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import crcbook as crc
from crcbook.attacks import smallest_margin
from crcbook.networks import read_network
from crcbook.proof.lipschitz import lipschitz_bound
from crcbook.proof.prover import Prover
from crcbook.training.losses import (
    CurvatureEstimate,
    LipschitzEstimate,
    clean_margins,
    crown_ibp_margins,
    generalised_cross_entropy,
    ibp_margins,
    runner_up,
    runner_up_points,
    trained_layers,
    worst_points,
)

MONOTONE = ["arctan", "sigmoid", "softplus", "tanh"]
INTERVAL_METHODS = [ibp_margins, crown_ibp_margins]
RADII = st.sampled_from([0.01, 0.1, 0.5, 2.0])


def batch(network, generator, items=3):
    """Random inputs, and labels that need not be the predicted ones."""
    x = torch.randn(items, network.inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(network.classes, (items,), generator=generator)


def lowest_margins(network, x, y, radius, generator):
    """The smallest margins met at random and attacked points of the balls, all classes."""
    found = clean_margins(network.logits(x), y)
    for _ in range(20):
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        size = torch.rand(len(x), 1, generator=generator, dtype=torch.float64) ** 0.2
        point = x + radius * size * nn.functional.normalize(step, dim=1)
        found = torch.minimum(found, clean_margins(network.logits(point), y))
    for target in range(network.classes):
        point = x
        for _ in range(5):
            _, gradient = network.margin_and_gradient(point, y, torch.full_like(y, target))
            point = x - radius * nn.functional.normalize(gradient, dim=1)
            found = torch.minimum(found, clean_margins(network.logits(point), y))
    return found


def identity_network(sizes, generator):
    """A linear network in several layers."""
    modules = [nn.Flatten()]
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.Linear(inputs, outputs, dtype=torch.float64)
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
        modules += [linear, nn.Identity()]
    return nn.Sequential(*modules[:-1])


@pytest.mark.parametrize("margins", INTERVAL_METHODS)
@given(case=random_networks(activations=MONOTONE), radius=RADII)
def test_no_point_of_a_ball_is_below_an_interval_margin(margins, case, radius):
    model, generator = case
    network = read_network(model)
    x, y = batch(network, generator)
    worst = margins(trained_layers(model, torch.float64), x, y, radius)
    found = lowest_margins(network, x, y, radius, generator)
    assert (found >= worst - 1e-9 * (1 + worst.abs())).all()
    assert torch.equal(worst.gather(1, y[:, None]), torch.zeros(3, 1, dtype=torch.float64))


@given(case=random_networks(), radius=RADII)
def test_no_point_of_a_ball_is_below_a_lipschitz_margin(case, radius):
    model, generator = case
    network = read_network(model)
    x, y = batch(network, generator)
    estimate = LipschitzEstimate(model)
    estimate.table(steps=300)
    worst = estimate.margins(x, y, radius).detach()
    found = lowest_margins(network, x, y, radius, generator)
    fall = clean_margins(network.logits(x), y) - worst
    assert (found >= worst - 1e-3 * fall - 1e-8).all()  # norms followed from below


@given(case=random_networks(activations=MONOTONE))
def test_without_a_radius_the_worst_margins_are_the_clean_ones(case):
    model, generator = case
    network = read_network(model)
    x, y = batch(network, generator)
    clean = clean_margins(network.logits(x), y)
    for margins in INTERVAL_METHODS:
        worst = margins(trained_layers(model), x, y, 0.0)
        assert torch.allclose(worst, clean, rtol=1e-9, atol=1e-9)
    worst = LipschitzEstimate(model).margins(x, y, 0.0)
    assert torch.equal(worst, clean_margins(model(x), y))


@pytest.mark.parametrize("margins", INTERVAL_METHODS)
@pytest.mark.parametrize("activation", MONOTONE)
def test_a_single_unit_is_bounded_exactly(margins, activation):
    generator = torch.Generator().manual_seed(4)
    model = crc.mlp([5, 1, 3], activation, seed=2).double()
    network = read_network(model)
    x, y = batch(network, generator, items=6)
    row = nn.functional.normalize(network.layers[0].weight, dim=1)
    ends = [clean_margins(network.logits(x + sign * 0.7 * row), y) for sign in (-1, 1)]
    worst = margins(trained_layers(model), x, y, 0.7).detach()
    assert torch.allclose(worst, torch.minimum(*ends), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [[6, 3], [6, 8, 3], [6, 8, 7, 5, 3]])
def test_crown_is_exact_where_the_network_is_linear(sizes):
    generator = torch.Generator().manual_seed(1)
    model = identity_network(sizes, generator)
    x, y = batch(read_network(model), generator, items=4)
    whole = torch.eye(sizes[0], dtype=torch.float64)
    for layer in trained_layers(model, torch.float64):
        whole = layer.weight @ whole
    exact = clean_margins(model(x), y) - 0.5 * (whole[y][:, None] - whole).norm(dim=2)
    crown = crown_ibp_margins(trained_layers(model), x, y, 0.5)
    interval = ibp_margins(trained_layers(model), x, y, 0.5)
    assert torch.allclose(crown, exact, rtol=1e-12)
    if len(sizes) == 2:  # then all three methods are
        assert torch.allclose(interval, exact, rtol=1e-12)
        assert torch.allclose(LipschitzEstimate(model).margins(x, y, 0.5), exact, rtol=1e-12)
    else:
        others = nn.functional.one_hot(y, sizes[-1]) == 0
        assert (interval < exact - 1e-6)[others].all()


def stated_crown(network, intervals, x, label, target, radius):
    """The docstring's bound for one input and target, each unit's line chosen by its sign."""
    last = network.layers[-1]
    rows = last.weight[label] - last.weight[target]
    offset = last.bias[label] - last.bias[target]
    for layer, (low, high) in zip(network.layers[-2::-1], reversed(intervals), strict=True):
        value, slope = layer.activation.value, layer.activation.slope
        line = torch.minimum(slope(low), slope(high))
        touched = torch.where(rows >= 0, low, high)
        offset = offset + (rows * (value(touched) - line * touched)).sum()
        rows = rows * line
        offset = offset + rows @ layer.bias
        rows = rows @ layer.weight
    return offset + rows @ x - radius * rows.norm()


def stated_intervals(network, x, radius):
    """Ends of preactivations, each sign of a weight by itself."""
    first = network.layers[0]
    z = first.weight @ x + first.bias
    intervals = [(z - radius * first.weight.norm(dim=1), z + radius * first.weight.norm(dim=1))]
    for before, layer in zip(network.layers, network.layers[1:-1], strict=False):
        low, high = (before.activation.value(end) for end in intervals[-1])
        up, down = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        intervals.append((up @ low + down @ high + layer.bias, up @ high + down @ low + layer.bias))
    return intervals


@given(case=random_networks(activations=MONOTONE), radius=RADII)
def test_crown_ibp_is_the_larger_of_its_line_and_the_intervals(case, radius):
    model, generator = case
    network = read_network(model)
    x, y = batch(network, generator)
    layers = trained_layers(model, torch.float64)
    interval, crown = (margins(layers, x, y, radius) for margins in INTERVAL_METHODS)
    assert (crown >= interval).all()
    for i, target in [(0, 0), (1, network.classes - 1), (2, 1)]:
        stated = stated_crown(
            network, stated_intervals(network, x[i], radius), x[i], y[i], target, radius
        )
        size = 1 + interval[i, target].abs().item()
        expected = max(stated.item(), interval[i, target].item())
        assert crown[i, target].item() == pytest.approx(expected, abs=1e-9 * size)


def test_crown_ibp_beats_the_intervals_on_small_balls():
    generator = torch.Generator().manual_seed(0)
    model = crc.mlp([20, 30, 30, 4], "tanh", seed=0).double()
    x, y = batch(read_network(model), generator, items=10)
    interval, crown = (m(trained_layers(model), x, y, 0.1) for m in INTERVAL_METHODS)
    others = nn.functional.one_hot(y, 4) == 0
    clean = clean_margins(model(x), y)
    assert ((clean - crown) < 0.5 * (clean - interval))[others].all()


@pytest.mark.parametrize("margins", INTERVAL_METHODS)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_that_are_not_monotone_are_refused(margins, activation):
    model = crc.mlp([4, 5, 3], activation)
    with pytest.raises(ValueError, match=f"monotone activations; got {activation}"):
        margins(trained_layers(model), torch.zeros(1, 4), torch.tensor([0]), 0.1)


@pytest.mark.parametrize("activation", SMOOTH)
def test_converged_lipschitz_constants_are_the_product_of_norms(activation):
    model = crc.mlp([9, 12, 7, 4], activation, seed=3).double()
    table = LipschitzEstimate(model).table(steps=3000).detach()
    network = read_network(model)
    product = torch.ones((), dtype=torch.float64)
    for layer in network.layers[:-1]:
        product = product * layer.activation.max_slope * torch.linalg.svdvals(layer.weight)[0]
    last = network.layers[-1].weight
    expected = product * (last[:, None] - last).norm(dim=2)
    assert torch.allclose(table, expected, rtol=1e-6, atol=0)
    label, target = (1 - torch.eye(4)).nonzero().T
    proved = lipschitz_bound(Prover.of(network), label, target)
    assert (proved <= table[label, target] * (1 + 1e-6)).all()


def test_one_hidden_layer_has_the_proved_product_bound():
    # One hidden unit: the sharper bound of crcbook.proof.lipschitz is then the product itself.
    model = crc.mlp([9, 1, 4], "tanh", seed=3).double()
    label, target = (1 - torch.eye(4)).nonzero().T
    proved = lipschitz_bound(Prover.of(read_network(model)), label, target)
    table = LipschitzEstimate(model).table(steps=3).detach()
    assert torch.allclose(table[label, target], proved, rtol=1e-9)


@pytest.mark.parametrize("name", ["ibp", "crown-ibp", "lipschitz", "curvature", "curvatures"])
def test_objectives_have_the_gradients_of_finite_differences(name):
    generator = torch.Generator().manual_seed(5)
    model = crc.mlp([6, 9, 8, 3], "tanh", seed=1).double()
    x, y = batch(read_network(model), generator, items=5)
    curvature, lipschitz = CurvatureEstimate(model), LipschitzEstimate(model)

    def objective():
        if name == "curvature":
            return curvature(steps=500)
        if name == "curvatures":
            return curvature.table(steps=500).mean()
        if name == "lipschitz":
            lipschitz.table(steps=500)
            return generalised_cross_entropy(-lipschitz.margins(x, y, 0.2), y, 0.3)
        margins = ibp_margins if name == "ibp" else crown_ibp_margins
        return generalised_cross_entropy(-margins(trained_layers(model), x, y, 0.2), y, 0.3)

    parameters = list(model.parameters())
    objective().backward()
    way = [torch.randn(p.shape, generator=generator).double() for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    slope = sum((g * w).sum() for g, w in zip(gradients, way, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, w in zip(parameters, way, strict=True):
                parameter += step * w
            ends.append(objective().item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope.item(), rel=1e-5)


def test_images_that_are_safe_by_far_are_attacked_too(digits, digits_model):
    x = digits.test.x[:50].flatten(1)
    y = digits_model(x).argmax(1)
    sure = deepcopy(digits_model)
    with torch.no_grad():
        sure[-1].weight.mul_(24)
        sure[-1].bias.mul_(24)
    margin = smallest_margin(read_network(sure), x.double(), y)
    assert 30 < margin.median() < 80
    moved = (worst_points(trained_layers(sure), x, y, radius=0.4, steps=5) - x).norm(dim=1)
    assert (moved[margin < 80] > 0.35).all()


def test_worst_points_stay_in_the_ball_and_raise_the_loss(digits, digits_model):
    x, y = digits.test.x[:50].flatten(1), digits.test.y[:50]
    points = worst_points(trained_layers(digits_model), x, y, radius=0.4, steps=5)
    assert ((points - x).norm(dim=1) <= 0.4 * (1 + 1e-5)).all()
    with torch.no_grad():
        before, after = (
            torch.nn.functional.cross_entropy(digits_model(p), y, reduction="none")
            for p in (x, points)
        )
    assert (after > before).all()


def test_boxed_worst_points_are_valid_inputs_that_lose_less(digits, digits_model):
    x, y = digits.test.x[:100].flatten(1), digits.test.y[:100]
    free, boxed = (
        worst_points(trained_layers(digits_model), x, y, 0.4, steps=8, box=box)
        for box in (False, True)
    )
    assert (free.amin() < 0 or free.amax() > 1) and boxed.amin() >= 0 and boxed.amax() <= 1
    assert (boxed - x).norm(dim=1).max() <= 0.4 * (1 + 1e-5)
    loss = [nn.functional.cross_entropy(digits_model(point), y) for point in (x, boxed, free)]
    assert loss[0] < loss[1] < loss[2]


def test_the_runner_up_is_the_best_of_the_others():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [5.0, 0.0, 4.0]])
    model = nn.Identity()
    assert runner_up(model, logits, torch.tensor([1, 2, 1])).tolist() == [2, 1, 0]


def test_the_published_attack_finds_the_smallest_margin_where_it_fills_the_ball(digits):
    model = crc.mlp([64, 48, 10], seed=0)
    crc.train(model, digits.train, crc.Recipe(radius=0.5, gamma=0.02, epochs=4, batch_size=64))
    model = model.double()
    x, y = digits.test.x[:60].flatten(1).double(), digits.test.y[:60]
    target = runner_up(model, x, y)
    curvature = -crc.curvature_bounds(model, y, target)[0]
    points = runner_up_points(
        trained_layers(model, torch.float64), x, (y, target), 0.3, curvature, 60
    )
    distance = (points - x).norm(dim=1)
    filled = distance > 0.3 * (1 - 1e-9)
    assert (distance <= 0.3 * (1 + 1e-9)).all() and filled.sum() >= 30
    network = read_network(model)
    found, _ = network.margin_and_gradient(points, y, target)
    for seed in range(3):
        adversary = crc.attack(model, x, y, radius=0.3, restarts=2, seed=seed).point
        margin, _ = network.margin_and_gradient(adversary, y, target)
        assert (margin >= found - 1e-7)[filled].all()


def test_the_published_attack_stops_short_where_the_curvature_says_so():
    generator = torch.Generator().manual_seed(0)
    model = crc.mlp([6, 9, 3], "tanh", seed=0).double()
    x, y = batch(read_network(model), generator, items=5)
    target = (y + 1) % 3
    curvature = torch.full_like(x[:, 0], 1e3)
    point = runner_up_points(
        trained_layers(model, torch.float64), x, (y, target), 0.5, curvature, 30
    )
    _, gradient = read_network(model).margin_and_gradient(point, y, target)
    assert torch.allclose(point, x - gradient / 1e3, rtol=0, atol=1e-12)
    assert ((point - x).norm(dim=1) < 0.1).all()
    # A linear margin has its minimum at the end of one step, and no curvature.
    model = crc.mlp([6, 3], seed=0).double()
    weight = model[1].weight.detach()
    away = nn.functional.normalize(weight[target] - weight[y], dim=1)
    point = runner_up_points(
        trained_layers(model, torch.float64), x, (y, target), 0.5, 0 * curvature, 1
    )
    assert torch.allclose(point, x + 0.5 * away, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("hidden", [[15], [15, 12], [8, 9, 10]])
def test_the_curvature_estimate_approaches_the_proved_bound_from_below(activation, hidden):
    model = crc.mlp([10, *hidden, 4], activation, seed=1)
    estimate = CurvatureEstimate(model)
    label, target = (1 - torch.eye(4)).nonzero().T
    bound = -crc.curvature_bounds(model, label, target)[0]
    table = estimate.table(steps=300).detach()
    found = table[label, target].double()
    assert torch.allclose(found, bound, rtol=1e-3) and (found <= bound * (1 + 1e-5)).all()
    assert (table.diagonal() == 0).all()
    assert estimate().item() == pytest.approx(bound.max().item(), rel=1e-3)


@pytest.mark.parametrize("hidden", [[15], [15, 12]])
def test_in_a_ball_the_estimate_is_between_the_balls_bound_and_the_global_one(hidden):
    model = crc.mlp([10, *hidden, 4], "tanh", seed=1)
    estimate, x = CurvatureEstimate(model), torch.linspace(-1, 1, 10)
    label, target = (1 - torch.eye(4)).nonzero().T
    bound = -crc.curvature_bounds(model, label, target, x=x[None], radius=0.3)[0].min()
    found = estimate(steps=300, x=x, radius=0.3)
    assert bound * (1 - 1e-3) <= found < 0.9 * estimate(steps=300)
    found.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("activation", ["softplus", "tanh"])
@pytest.mark.parametrize("hidden", [[15], [15, 12], [8, 9, 10]])
def test_with_the_slopes_of_a_point_the_estimate_covers_the_hessian_there(activation, hidden):
    model = crc.mlp([10, *hidden, 4], activation, seed=1)
    estimate, x = CurvatureEstimate(model), torch.linspace(-1, 1, 10)

    def margins(point):
        logits = model(point[None])[0]
        return (logits[:, None] - logits).flatten()

    bends = -torch.linalg.eigvalsh(torch.func.hessian(margins)(x)).min()
    found = estimate(steps=300, x=x)
    assert bends <= found * (1 + 1e-4)
    anywhere = estimate(steps=300)
    if len(hidden) == 1:  # no slope takes part
        assert found.item() == pytest.approx(anywhere.item())
    else:
        assert found < 0.9 * anywhere
    found.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model[1].weight.grad.abs().sum() > 0


def test_the_largest_curvature_is_that_of_the_table_with_its_gradient():
    model = crc.mlp([10, 15, 12, 4], "sigmoid", seed=1)
    estimate, parameters = CurvatureEstimate(model), list(model.parameters())[::2]
    largest = estimate(steps=50)
    found = torch.autograd.grad(largest, parameters)
    again = estimate.table(steps=0).max()
    assert largest.item() == pytest.approx(again.item(), rel=1e-6)
    for one, other in zip(found, torch.autograd.grad(again, parameters), strict=True):
        assert one.abs().sum() > 0 and torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_the_generalised_cross_entropy_joins_its_two_ends():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([1, 2])
    p = logits.softmax(1)[[0, 1], y]
    for q, values in [(0.0, -p.log()), (0.3, (1 - p**0.3) / 0.3), (1.0, 1 - p)]:
        found = generalised_cross_entropy(logits, y, q)
        assert found.item() == pytest.approx(values.mean().item(), rel=1e-12)
    near = generalised_cross_entropy(logits, y, 1e-9)
    assert near.item() == pytest.approx(generalised_cross_entropy(logits, y, 0.0).item(), rel=1e-6)
