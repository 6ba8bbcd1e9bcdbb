"""Proofs in single precision lose no rounding, judged in 60 digits."""

import mpmath
import pytest
import torch
from conftest import ROWS, evaluate_exactly, thin_model
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.activations import ROUNDING
from crcbook.networks import read_network
from crcbook.proof.arithmetic import SINGLE_UNIT, UNIT, single_sums_hold
from crcbook.proof.quadratic import Prover
from crcbook.stages import single as module
from crcbook.stages.single import Margins, Sieve

GRID = torch.linspace(-90, 90, 60_001)


def margins_of(prover, x, label, target, curvature, limit):
    """What a sieve wants to know of margins."""
    z_error = prover.rounding.preactivation_errors(x.norm(dim=1))[0]
    z = prover.network.first(x).float()
    same = (torch.full((len(x),), value, dtype=torch.int64) for value in (label, target))
    numbers = (torch.full((len(x),), value, dtype=torch.float64) for value in (curvature, limit))
    curvature, limit = numbers
    return Margins(*same, curvature, z, z_error, limit)


@given(
    activation=st.sampled_from(["softplus", "tanh", "gelu"]),
    hidden=st.sampled_from([(12,), (10, 6)]),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_every_rounding_is_subtracted(activation, hidden, scale, offset, seed):
    model, generator = thin_model([8, *hidden, 3], activation, scale, seed)
    with torch.no_grad():
        model[-1].bias[0].add_(offset)
    prover = Prover.of(read_network(model))
    sieve, k = Sieve.of(prover), scale
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    way = torch.randn(3, prover.sketch.basis.shape[1], generator=generator) / (1 + scale)
    margins = margins_of(prover, x, 0, 1, k, 1e30)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parabola_radius", lambda *facts: seen.append(facts) or facts[0] * 0)
        patch.setattr(module, "_STEPS", 1)
        _, rows, onward = sieve.sift(margins, way, None)
        assert rows.tolist() == [0, 1, 2]
        patch.setattr(module, "_STEPS", 2)
        sieve.sift(margins, way, None)
    with mpmath.workdps(60):
        for i in range(3):
            u = mpmath.matrix(way[i].double().tolist())
            first = mpmath.matrix(prover.sketch.basis.tolist()) * u
            second = mpmath.matrix(onward[i].double().tolist())
            for (value, slope, _), d in zip(seen[1:], (first, second), strict=True):
                c = mpmath.matrix(x[i].tolist()) + d
                f, g = evaluate_exactly(prover.network, c, 0, 1)
                q = f - (g.T * d)[0] - k * mpmath.norm(d) ** 2 / 2
                s = mpmath.norm(g + k * d)
                assert value[i].item() <= q and s <= slope[i].item()
                size = abs(f) + (1 + scale) ** 2 * (1 + mpmath.norm(d) ** 2)
                assert q - value[i].item() < 1e-3 * size  # and not all is lost


@pytest.mark.parametrize("name", ROWS)
def test_float32_is_within_rounding_of_float64(name):
    row, exact = ROWS[name], GRID.double()
    at_zero = float(row.value(torch.zeros(1, dtype=torch.float64)).abs())
    scale = row.max_slope * exact.abs() + at_zero
    unit = ROUNDING * SINGLE_UNIT / UNIT
    assert ((row.value(GRID).double() - row.value(exact)).abs() <= unit * scale).all()
    assert ((row.slope(GRID).double() - row.slope(exact)).abs() <= unit * row.max_slope).all()


@pytest.mark.parametrize("radius", [None, 0.4])
def test_bounds_are_sound_and_nearly_those_of_double_precision(radius, digits, digits_model):
    network = read_network(digits_model)
    prover, x, y = Prover.of(network), digits.test.x[:200], digits.test.y[:200]
    sieve, label = Sieve.of(prover), int(y.mode().values)
    x = x[y == label].double().flatten(1)
    exact = crc.certify(digits_model, x, torch.full((len(x),), label), targets="all")
    worst = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for target in range(10):
        if target == label:
            continue
        k = float(-crc.curvature_bounds(digits_model, label, target)[0])
        margins = margins_of(prover, x, label, target, k, 1e30)
        way = torch.zeros(len(x), prover.sketch.basis.shape[1])
        worst = worst.minimum(sieve.sift(margins, way, radius)[0])
    correct = exact.radius > 0
    if radius is None:
        assert (worst <= exact.radius * (1 + 1e-9))[correct].all()
        assert worst[correct].sum() > 0.97 * exact.radius[correct].sum()
    else:
        margin = crc.attack(digits_model, x, torch.full((len(x),), label), radius=radius).margin
        assert (worst <= margin).all()
        assert ((worst > 0) == (exact.radius > radius)).double().mean() > 0.9


def test_products_that_round_more_are_noticed(monkeypatch, digits, digits_model):
    assert single_sums_hold(torch.device("cpu"))
    x, y = digits.test.x[:60], digits.test.y[:60]
    quick = crc.certify(digits_model, x, y)
    product = torch.Tensor.__matmul__

    def rounded(a, b):
        if a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return product(a, b)

    def rounded_twice(a, b):
        if a.dtype != torch.float32:
            return product(a, b)
        (a, a_rest), (b, b_rest) = (
            (m.bfloat16().float(), (m - m.bfloat16().float()).bfloat16().float()) for m in (a, b)
        )
        return product(a, b) + product(a, b_rest) + product(a_rest, b)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", rounded_twice)
        assert not single_sums_hold(torch.device("cpu"))
        patch.setattr(torch.Tensor, "__matmul__", rounded)
        assert not single_sums_hold(torch.device("cpu"))
        assert Sieve.of(Prover.of(read_network(digits_model))) is None
        slow = crc.certify(digits_model, x, y)
    torch.testing.assert_close(quick.radius, slow.radius, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_sizes_that_float32_lacks_prove_nothing_false(scale):
    model, generator = thin_model([8, 12, 3], "tanh", 1.0, 0)
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[3].weight.mul_(1 / scale)
    prover = Prover.of(read_network(model))
    x = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    way = torch.randn(20, prover.sketch.basis.shape[1], generator=generator)
    label = int(prover.network.logits(x).argmax(1).mode().values)
    target = (label + 1) % 3
    k = float(-crc.curvature_bounds(model, label, target)[0])
    found = Sieve.of(prover).sift(margins_of(prover, x, label, target, k, 1e30), way, None)[0]
    attacked = crc.attack(model, x, torch.full((20,), label)).distance
    assert (found <= attacked).all()
