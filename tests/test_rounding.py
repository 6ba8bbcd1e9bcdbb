"""Evaluations are within the bounds that certificates subtract, judged in 80 digits."""

import mpmath
import pytest
import torch
from conftest import evaluate_exactly

import crcbook as crc
from crcbook.networks import read_network
from crcbook.proof.arithmetic import DOUBLE, SINGLE
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.rounding import MarginFacts, RoundingModel

FORMATS = pytest.mark.parametrize("arithmetic", [DOUBLE, SINGLE], ids=["float64", "float32"])
NETWORKS = [
    pytest.mark.parametrize("activation", ["softplus", "tanh", "gelu"]),
    pytest.mark.parametrize("sizes", [[5, 8, 3], [4, 6, 5, 2]]),
    pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0]),
]


def on_networks(test):
    for mark in NETWORKS:
        test = mark(test)
    return test


def scaled_prover(activation, sizes, scale):
    """A network whose weights and biases are scaled, prepared for proofs."""
    model = crc.mlp(sizes, activation, seed=4).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return Prover.of(read_network(model))


def entries_of(prover, x):
    """The margins of class 0 over class 1."""
    zero = torch.zeros(len(x), dtype=torch.int64)
    return Entries.of(prover, x, zero, zero + 1)


def inputs(prover, spread=1.0):
    generator = torch.Generator().manual_seed(1)
    return spread * torch.randn(4, prover.network.inputs, generator=generator, dtype=torch.float64)


def exactly(values):
    return mpmath.matrix(values.tolist())


@FORMATS
@on_networks
def test_evaluations_are_within_the_bounds_and_the_bounds_within_reason(
    activation, sizes, scale, arithmetic
):
    prover = scaled_prover(activation, sizes, scale)
    network, x = prover.network.to(arithmetic.dtype), inputs(prover)
    entries, rounding = entries_of(prover, x), prover.rounding
    z = entries.z.to(arithmetic.dtype)
    active, slopes = network.forward(z)
    weights = network.margin_weights(entries.label, entries.target)
    units = network.backward(weights, slopes)
    found = (weights * active).sum(1), network.input_gradient(units)
    z, active, units = (arithmetic.norm(rows) for rows in (z, active, units))
    facts = MarginFacts.of(rounding, entries.label, entries.target)
    forward = rounding.forward(z, entries.z_error + arithmetic.unit * z, arithmetic)
    value = forward.value_error(facts, active)
    _, slope = forward.gradient_errors(facts, units)
    bias = prover.network.layers[-1].bias.tolist()
    with mpmath.workdps(80):
        for i, point in enumerate(x):
            margin, gradient = evaluate_exactly(prover.network, point, 0, 1)
            margin = margin - mpmath.mpf(bias[0]) + mpmath.mpf(bias[1])
            assert abs(margin - found[0][i].item()) <= value[i].item()
            assert mpmath.norm(gradient - exactly(found[1][i])) <= slope[i].item()
    size = max(1.0, scale) ** len(sizes) * arithmetic.unit / DOUBLE.unit
    assert (value < 1e-11 * size).all() and (slope < 1e-11 * size).all()


@FORMATS
@pytest.mark.parametrize("spread", [1.0, 1e4])
@on_networks
def test_what_is_proved_is_true_in_real_arithmetic(activation, sizes, scale, spread, arithmetic):
    prover = scaled_prover(activation, sizes, scale)
    x = inputs(prover, spread)
    # Far from the inputs, where most digits of the preactivations cancel.
    d = (0.7 * inputs(prover).flip(0) - x).to(arithmetic.dtype)
    entries = entries_of(prover, x)
    quadratic, _ = prover.prove(entries, d, arithmetic)
    assert quadratic.value.isfinite().all()
    jump = MarginFacts.of(prover.rounding, entries.label, entries.target).deviation
    with mpmath.workdps(80):
        for i in range(len(x)):
            point, away = exactly(x[i]) + exactly(d[i]), exactly(d[i])
            margin, gradient = evaluate_exactly(prover.network, point, 0, 1)
            k = mpmath.mpf(entries.curvature[i].item())
            value = margin - (gradient.T * away)[0] - k * (away.T * away)[0] / 2
            assert quadratic.value[i].item() <= value
            direction = -gradient - k * away
            error = mpmath.norm(direction - exactly(quadratic.direction[i]))
            assert error <= quadratic.error[i].item()
            size = max(1, scale) ** len(sizes) * spread**2 * arithmetic.unit
            assert value - quadratic.value[i].item() - jump[i].item() <= 1e4 * size
            assert quadratic.error[i].item() <= 1e4 * size


@on_networks
def test_margins_of_float64_are_within_their_error(activation, sizes, scale):
    prover = scaled_prover(activation, sizes, scale)
    network, x = prover.network, inputs(prover)
    entries = entries_of(prover, x)
    margin, error = prover.margin_at(entries, x)
    units = network.preactivations(x)
    unit_errors = prover.rounding.preactivation_errors(x.norm(dim=1))
    with mpmath.workdps(80):
        for i, point in enumerate(x):
            exact, _ = evaluate_exactly(network, point, 0, 1)
            assert abs(exact - margin[i].item()) <= error[i].item()
            first = network.layers[0]
            z = exactly(first.weight) * exactly(point) + exactly(first.bias)
            assert mpmath.norm(z - exactly(units[0][i])) <= unit_errors[0][i].item()
    jump = MarginFacts.of(prover.rounding, entries.label, entries.target).deviation
    assert (error - jump < 1e-11 * max(1.0, scale) ** len(sizes)).all()


def test_deviation_covers_torchs_softplus_and_is_zero_elsewhere():
    model = crc.mlp([3, 10, 2], "softplus", seed=0).double()
    with torch.no_grad():
        model[1].weight.mul_(30)
    network = read_network(model)
    x = torch.randn(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gap = (model(x).detach() - network.logits(x)) @ torch.tensor([1.0, -1.0]).double()
    weights = network.margin_weights(torch.tensor([0]), torch.tensor([1]))
    deviation = RoundingModel.of(network).deviation(weights)
    assert 1e-12 < gap.abs().max() <= deviation < 1e-7
    smooth = read_network(crc.mlp([3, 10, 2], "tanh"))
    assert RoundingModel.of(smooth).deviation(weights) == 0
