"""Lipschitz radii: sound against attacks, exact where a network is linear, tighter than norms."""

import math

import pytest
import torch
from conftest import EVERY, SMOOTH, every_pair, random_networks
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.attacks import Aim, boundary_points
from crcbook.certificate.question import Radius
from crcbook.networks import read_network
from crcbook.proof.lipschitz import lipschitz_bound
from crcbook.proof.prover import Entries, Prover
from crcbook.stages.lipschitz import Lipschitz


def lipschitz_radius(network, x, label, target):
    """What the stage of cones proves."""
    prover = Prover.of(network)
    radius, _ = Lipschitz(prover)(Radius(), Entries.of(prover, x, label, target))
    return radius


def product_of_norms(model, label, target):
    """The textbook bound of a margin's Lipschitz constant."""
    layers = read_network(model).layers
    product = (layers[-1].weight[label] - layers[-1].weight[target]).norm()
    for layer in layers[:-1]:
        product *= layer.activation.max_slope * torch.linalg.matrix_norm(layer.weight, 2)
    return product.item()


@given(random_networks(activations=EVERY))
def test_no_attack_beats_a_radius(case):
    model, generator = case
    network = read_network(model)
    x = torch.randn(4, network.inputs, generator=generator, dtype=torch.float64)
    y = network.logits(x).argmax(1)
    item, label, target = every_pair(network.classes, y)
    radius = lipschitz_radius(network, x[item], label, target)
    assert (radius >= 0).all()
    found = boundary_points(Aim(network, x[item], label, target))
    distance = (found - x[item]).norm(dim=1).nan_to_num(nan=torch.inf)
    assert (distance >= radius).all()
    attacked = crc.attack(model, x, y, restarts=3)
    assert (attacked.distance >= radius.reshape(4, -1).amin(1)).all()


@given(random_networks(activations=EVERY), st.sampled_from([0.1, 1.0, 5.0]))
def test_a_bound_lies_between_the_gradients_and_the_product_of_norms(case, spread):
    model, generator = case
    network = read_network(model)
    label, target = torch.tensor([0]), torch.tensor([1])
    bound = lipschitz_bound(Prover.of(network), label, target)
    assert bound.item() <= product_of_norms(model, 0, 1) * (1 + 1e-6)
    x = spread * torch.randn(50, network.inputs, generator=generator, dtype=torch.float64)
    _, gradient = network.margin_and_gradient(x, label.expand(50), target.expand(50))
    assert (gradient.norm(dim=1) <= bound).all()


def test_linear_networks_get_their_exact_distance():
    first, last = crc.mlp([6, 5], seed=1).double()[1], crc.mlp([5, 4], seed=0).double()[1]
    for model in (crc.mlp([6, 4], seed=0).double(), torch.nn.Sequential(first, last)):
        x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        network = read_network(model)
        item, label, target = every_pair(4, network.logits(x).argmax(1))
        margin, gradient = network.margin_and_gradient(x[item], label, target)
        radius = lipschitz_radius(network, x[item], label, target)
        assert (radius <= margin / gradient.norm(dim=1)).all()
        torch.testing.assert_close(radius, margin / gradient.norm(dim=1), rtol=1e-9, atol=0)


def test_one_softplus_unit_attains_its_constant():
    model = crc.mlp([1, 1, 2], "softplus").double()
    with torch.no_grad():
        for parameter, value in zip(
            model.parameters(), (3.0, 0.0, [[2.0], [0.0]], 0.0), strict=True
        ):
            parameter.copy_(torch.tensor(value, dtype=torch.float64))
    prover = Prover.of(read_network(model))  # f = 2 softplus(3x), f' rises to 6
    bound = lipschitz_bound(prover, torch.tensor([0]), torch.tensor([1]))
    assert bound.item() == pytest.approx(6.0, rel=1e-10)
    assert bound.item() >= 6.0


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("sizes", [[8, 20, 20, 3], [8, 20, 20, 20, 3], [8, 20, 20, 20, 20, 3]])
def test_deep_bounds_are_well_below_the_product_of_norms(activation, sizes):
    model = crc.mlp(sizes, activation, seed=1)
    bound = lipschitz_bound(
        Prover.of(read_network(model)), torch.tensor([0]), torch.tensor([1])
    ).item()
    assert bound < 0.7 * product_of_norms(model, 0, 1)


def test_margins_that_do_not_move():
    model = crc.mlp([3, 6, 3], seed=1).double()
    with torch.no_grad():
        model[3].weight[1], model[3].bias[1] = model[3].weight[0], model[3].bias[0] - 1
    prover = Prover.of(read_network(model))
    x = torch.zeros(2, 3, dtype=torch.float64)
    label, target = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert (lipschitz_bound(prover, label, target) == 0).all()
    assert lipschitz_radius(prover.network, x, label, target).tolist() == [math.inf, 0.0]
    same = torch.tensor([2])
    assert lipschitz_radius(prover.network, x[:1], same, same) == 0


def test_a_margin_within_the_jump_of_torchs_softplus_is_not_proved():
    model = crc.mlp([1, 1, 2], "softplus").double()
    prover = Prover.of(read_network(model))
    weights = prover.network.margin_weights(torch.tensor([0]), torch.tensor([1]))
    jump = prover.rounding.deviation(weights).item()
    x, label, target = torch.zeros(1, 1).double(), torch.tensor([0]), torch.tensor([1])
    margin, _ = prover.network.margin_and_gradient(x, label, target)
    for gap, proved in [(0.9 * jump, False), (1.1 * jump, True)]:
        shifted = crc.mlp([1, 1, 2], "softplus").double()
        with torch.no_grad():
            shifted[3].bias[0] += gap - margin[0]
        radius = lipschitz_radius(read_network(shifted), x, label, target)
        assert (radius > 0).item() is proved


def test_an_overflowing_input_leaves_the_others_alone():
    network = read_network(crc.mlp([3, 8, 3], seed=0).double())
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    item, label, target = every_pair(3, network.logits(x).argmax(1))
    alone = lipschitz_radius(network, x[item], label, target)
    x[1] = 1e308
    together = lipschitz_radius(network, x[item], label, target)
    assert (together[item == 1] == 0).all()
    torch.testing.assert_close(together[item != 1], alone[item != 1], rtol=1e-12, atol=0)


def test_an_edited_model_is_bounded_again():
    model = crc.mlp([4, 8, 3], seed=0).double()
    label, target = torch.tensor([0]), torch.tensor([1])
    before = lipschitz_bound(Prover.of(read_network(model)), label, target)
    with torch.no_grad():
        model[1].weight.mul_(2)
    after = lipschitz_bound(Prover.of(read_network(model)), label, target)
    assert after.item() == pytest.approx(2 * before.item(), rel=1e-7)


def test_trained_digits_are_certified_by_the_first_order_too(digits, digits_model):
    x, y = digits.test.x[:60], digits.test.y[:60]
    radius = crc.certify(digits_model, x, y, method="lipschitz").radius
    attacked = crc.attack(digits_model, x, y).distance
    assert (radius <= attacked).all()
    assert radius.mean() > 0.5 * attacked.mean()


def test_a_verdict_is_that_of_the_radius(digits, digits_model):
    x, y = digits.test.x[:230], digits.test.y[:230]
    radius = crc.certify(digits_model, x, y, method="lipschitz").radius
    ball = radius[radius > 0].median().item()
    robust = crc.verify(digits_model, x, y, ball, method="lipschitz").robust
    decided = (radius - ball).abs() > 1e-9 * ball
    assert torch.equal(robust[decided], (radius >= ball)[decided])
    assert robust.any() and not robust.all()
    assert not crc.attack(digits_model, x[robust], y[robust], radius=ball).success.any()
    wrong = (y + 1) % 10
    missed = digits_model(x).argmax(1) != wrong
    refuted = crc.verify(digits_model, x, wrong, 1e-3, method="lipschitz").robust
    assert not refuted[missed].any()
