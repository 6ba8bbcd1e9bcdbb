"""Attacks find what is there to be found, and stay where they may search."""

import functools

import pytest
import torch
from conftest import random_networks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import crcbook as crc
from crcbook.attacks import Aim, boundary_points
from crcbook.networks import read_network


@given(random_networks(), st.sampled_from([0.1, 1.0, 10.0]))
def test_points_lie_in_the_ball_and_margins_are_true(case, radius):
    model, generator = case
    x = torch.randn(4, model[1].in_features, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    attacked = crc.attack(model, x, y, radius=radius, restarts=2)
    assert (attacked.distance <= radius).all()
    torch.testing.assert_close(attacked.distance, (attacked.point - x).norm(dim=1))
    logits = model(attacked.point).detach()
    own = logits.gather(1, y[:, None])[:, 0]
    margin = own - logits.scatter(1, y[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(attacked.margin, margin, rtol=1e-6, atol=1e-6)
    assert torch.equal(attacked.success, attacked.margin <= 0)
    clean = model(x).detach()
    start = clean.gather(1, y[:, None])[:, 0] - clean.scatter(1, y[:, None], -torch.inf).amax(1)
    assert (attacked.margin <= start + 1e-7).all()


def test_the_distance_to_a_hyperplane_is_found_exactly():
    model = crc.mlp([8, 5], seed=2).double()
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = model(x).argmax(1)
    exact = crc.certify(model, x, y).radius
    attacked = crc.attack(model, x, y)
    torch.testing.assert_close(attacked.distance, exact, rtol=1e-6, atol=0)
    assert (attacked.margin < 1e-12).all()
    assert crc.attack(model, x, y, radius=exact.max().item() * 1.01).success.all()
    assert not crc.attack(model, x, y, radius=exact.min().item() * 0.99).success.any()


@pytest.mark.parametrize("power", [-140, -40, 40, 140])
def test_the_unit_of_the_inputs_does_not_matter(power):
    model = crc.mlp([4, 9, 3], seed=3).double()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = model(x).argmax(1)
    distance, certificate = crc.attack(model, x, y).distance, crc.certify(model, x, y)
    assert distance.isfinite().all() and certificate.exact.any()
    with torch.no_grad():
        model[1].weight.mul_(2.0**power)
    x = x / 2.0**power
    scaled, again = crc.attack(model, x, y).distance, crc.certify(model, x, y)
    torch.testing.assert_close(scaled * 2.0**power, distance, rtol=1e-6, atol=0)
    torch.testing.assert_close(again.radius * 2.0**power, certificate.radius, rtol=1e-6, atol=0)
    assert torch.equal(again.exact, certificate.exact)


def test_a_misclassified_input_is_its_own_adversary():
    model = crc.mlp([3, 4, 2], seed=0).double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wrong = model(x).argmin(1)
    for attacked in (crc.attack(model, x, wrong), crc.attack(model, x, wrong, radius=0.1)):
        assert attacked.success.all() and torch.equal(attacked.point, x)
        assert (attacked.distance == 0).all()


def test_nothing_is_found_where_nothing_is():
    model = crc.mlp([3, 4, 2], "tanh", seed=0).double()
    with torch.no_grad():
        model[3].bias.copy_(torch.tensor([50.0, 0.0]))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    attacked = crc.attack(model, x, torch.zeros(4, dtype=torch.int64))
    assert not attacked.success.any()
    assert attacked.point.isnan().all() and (attacked.distance == torch.inf).all()


@given(random_networks())
def test_boundary_points_lie_just_outside(case):
    """The found points are adversarial, and a step of 1e-8 of the way back none of them is."""
    model, generator = case
    network = read_network(model)
    x = torch.randn(4, network.inputs, generator=generator, dtype=torch.float64)
    order = network.logits(x).argsort(dim=1, descending=True)
    label, target = order[:, 0], order[:, 1]
    point = boundary_points(Aim(network, x, label, target))
    found = point.isfinite().all(1)
    back = point - 1e-8 * (point - x)

    def margin(at):
        logits = network.logits(at)
        return (logits.gather(1, label[:, None]) - logits.gather(1, target[:, None])).squeeze(1)

    slope = (margin(x) - margin(point)).abs()
    clear = found & (slope > 1e-3)  # of rounding
    assert (margin(point)[found] <= 0).all()
    assert (margin(back)[clear] > -1e-12).all()


def test_more_restarts_help_and_never_hurt(digits, digits_model):
    x, y = digits.test.x[:60].double(), digits.test.y[:60]
    few = crc.attack(digits_model, x, y, radius=0.7, steps=3)
    many = crc.attack(digits_model, x, y, radius=0.7, steps=3, restarts=3)
    assert (many.margin <= few.margin).all() and (many.margin < few.margin).any()


def test_attacks_are_reproducible_and_follow_the_seed(digits, digits_model):
    x, y = digits.test.x[:20], digits.test.y[:20]
    first, second, other = (
        crc.attack(digits_model, x, y, steps=3, restarts=2, seed=seed).point for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_bad_settings_are_refused():
    model, x, y = crc.mlp([3, 4, 2]), torch.zeros(1, 3), torch.tensor([0])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        crc.attack(model, x, y, steps=0)
    with pytest.raises(ValueError, match="radius must be positive"):
        crc.attack(model, x, y, radius=0)


def relu_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


ITEMS = torch.rand(7, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [None, 2.0])
def test_any_differentiable_function_is_attacked(radius, dtype):
    model, x = relu_network().to(dtype), ITEMS.to(dtype)
    y = model(x).argmax(1)
    found = crc.attack(model, x, y, radius=radius)
    for function in (lambda t: 1 * model(t), model.forward, functools.partial(model)):
        again = crc.attack(function, x, None, radius=radius)
        assert torch.equal(again.point, found.point) and torch.equal(again.success, found.success)
    logits = model(found.point[found.success]).detach()
    own = logits.gather(1, y[found.success][:, None])
    assert found.success.sum() > 3 and (own <= logits.scatter(
        1, y[found.success][:, None], -torch.inf).amax(1, keepdim=True)).all()  # fmt: skip
    assert found.point.dtype == dtype and found.point.shape == x.shape
    if radius is not None:
        assert (found.distance <= radius).all()
    boxed = crc.attack(lambda t: model(t), x.numpy(), y.numpy(), radius, (0.0, 1.0))
    assert (boxed.point[boxed.success] >= 0).all() and (boxed.point[boxed.success] <= 1).all()


def test_an_unread_function_is_attacked_as_well_as_the_network_that_can_be_read():
    model = crc.mlp([12, 16, 3], seed=0).double()
    x = ITEMS.double()
    for options in ({}, {"radius": 3.0}, {"box": (-9.0, 9.0)}, {"restarts": 2}):
        read, unread = crc.attack(model, x, **options), crc.attack(lambda t: model(t), x, **options)
        assert torch.equal(read.success, unread.success) and read.success.any()
        near = {"rtol": 1e-3, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(unread.margin, read.margin, **near)
        torch.testing.assert_close(unread.distance, read.distance, **near)


def test_the_distance_of_a_piecewise_linear_function_is_found():
    def line(t):  # |x1| + x2 against 1
        return torch.stack([torch.full_like(t[:, 0], 1.0), t[:, 0].abs() + t[:, 1]], dim=1)

    x = torch.tensor([[0.5, 0.0], [-0.5, 0.0]])
    found = crc.attack(line, x)
    assert found.distance.tolist() == pytest.approx([0.5 / 2**0.5] * 2, rel=1e-5)
    assert crc.attack(lambda t: t[:, 1] + t[:, 0] - 1, x[:1]).distance.item() == pytest.approx(
        0.5 / 2**0.5, rel=1e-5
    )


def test_an_attack_of_a_function_works_where_no_gradients_are_wanted():
    model = relu_network()
    expected = crc.attack(model, ITEMS).point
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(crc.attack(model, ITEMS).point, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("batch", [1, 4])
def test_a_program_of_a_fixed_batch_that_cannot_be_read_is_attacked(batch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    program = torch.export.export(model, (ITEMS[:batch],))
    for exported in (program, program.module()):
        found = crc.attack(exported, ITEMS)
        moved = (found.point.reshape(ITEMS.shape) - ITEMS).flatten(1).norm(dim=1)
        logits, answer = model(found.point), model(ITEMS).argmax(1)[:, None]
        others = logits.scatter(1, answer, -torch.inf).amax(1)
        assert found.success.all() and (logits.gather(1, answer)[:, 0] - others <= 1e-6).all()
        torch.testing.assert_close(moved.double(), found.distance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_what_a_ball_holds_is_found_without_one(seed):
    """Steps towards a linearised boundary can lose their way between the pieces of a ReLU."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(30, 8)
    in_ball = crc.attack(model, x, radius=5.0).success
    assert in_ball.any() and (crc.attack(model, x).distance[in_ball] < torch.inf).all()


def test_what_is_no_such_function_is_refused():
    weight, trained = torch.ones(12, 3), nn.Linear(12, 3)
    spread = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    mixing = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    random = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.ReLU(), nn.Linear(12, 3))
    for model, error, message in (
        (3, TypeError, "must be a module or a function; got int"),
        (lambda t: t.detach().flatten(1) @ weight, ValueError, "torch can differentiate"),
        (lambda t: trained(t.detach().flatten(1)), ValueError, "torch can differentiate"),
        (lambda t: (4 * t).round().flatten(1) @ spread, ValueError, "gradient .* is 0 at all"),
        (lambda t: (1e4 * t.flatten(1) @ spread).softmax(1), ValueError, "gradient .* is 0 at all"),
        (lambda t: t.flatten(1) @ weight[:5], ValueError, "the model fails on torch.float32"),
        (lambda t: t, ValueError, r"must give \(7, classes\) logits"),
        (lambda t: t.flatten(1).argmax(1), ValueError, "of torch.int64"),
        (lambda t: (t, t), ValueError, "a tensor of logits; got tuple"),
        (mixing, ValueError, r"call model.eval\(\)"),
        (lambda t: t.flatten(1) @ weight * torch.nan, ValueError, "gives NaN or infinity"),
        (
            lambda t: (t.flatten(1) @ spread[:, :1]).sigmoid(),
            ValueError,
            "between 0 and 1, as a pro",
        ),
        (random, ValueError, r"call model.eval\(\)"),
        (lambda t: random(t), ValueError, r"call model.eval\(\)"),
    ):
        with pytest.raises(error, match=message):
            crc.attack(model, ITEMS)
    before = mixing[1].running_mean.clone()
    assert torch.equal(before, torch.zeros(12))
