"""Quadratics below margins: every rounding is subtracted, judged in 60 digits where sums cancel."""

from dataclasses import replace

import mpmath
import pytest
import torch
from conftest import evaluate_exactly, thin_model
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.checks import as_box
from crcbook.networks import read_network
from crcbook.proof.box import Room
from crcbook.proof.quadratic import Minorant, Pairs, Prover
from crcbook.stages.search import search


@st.composite
def cancelling_cases(draw):
    """A prover, inputs and points near them, where sums are far smaller than their terms."""
    activation = draw(st.sampled_from(["softplus", "tanh", "gelu"]))
    hidden = draw(st.sampled_from([(6,), (5, 4)]))
    scale, seed = draw(st.sampled_from([1.0, 30.0, 1e3])), draw(st.integers(0, 99))
    model = crc.mlp([4, *hidden, 3], activation, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(1, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[1].bias.copy_(-(x @ model[1].weight.T)[0])
        logits = model(x)[0]
        model[-1].bias.add_(1e6 * scale + logits[0] - logits)
        model[-1].bias[0].add_(1e-3)
    near = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64) / (10 * scale)
    return Prover.of(read_network(model)), x + near[0], x + near[0] + near[1], scale


def same(count, number):
    return torch.full((count,), number, dtype=torch.int64)


@given(cancelling_cases())
def test_minorants_lose_no_rounding(case):
    prover, x0, points, scale = case
    k = torch.full((4,), scale, dtype=torch.float64)
    pairs = Pairs(x0, same(4, 0), same(4, 1), k)
    margin, gradient = prover.network.margin_and_gradient(points, pairs.label, pairs.target)
    found = prover.minorant(pairs, points, margin, gradient)
    margins = {radius: found.margin(radius).tolist() for radius in (1e-9, 1e-3, 1.0, 1e3)}
    value, slope, error, radius = (
        column.tolist() for column in (found.value, found.slope, found.error, found.radius())
    )
    with mpmath.workdps(60):
        for i in range(4):
            f, g = evaluate_exactly(prover.network, points[i], 0, 1)
            away = mpmath.matrix(x0[i].tolist()) - mpmath.matrix(points[i].tolist())
            q = f + (g.T * away)[0] - scale * mpmath.norm(away) ** 2 / 2
            s = scale * away - g
            assert mpmath.norm(mpmath.matrix(found.direction[i].tolist()) - s) <= error[i]
            assert value[i] <= q and mpmath.norm(s) <= slope[i]
            assert q - value[i] < 1e-6 + 1e-11 * scale**2  # and not all is lost
            for r, bound in margins.items():
                assert bound[i] <= q - r * mpmath.norm(s) - scale * mpmath.mpf(r) ** 2 / 2
            root = mpmath.sqrt(mpmath.norm(s) ** 2 + 2 * scale * max(q, 0))
            assert radius[i] <= max(q, 0) * 2 / (mpmath.norm(s) + root)


@given(cancelling_cases())
def test_a_glance_loses_no_rounding(case):
    prover, x0, _, _ = case
    label, target = same(4, 0), torch.tensor([[1, 2]]).expand(4, 2)
    logits, _, slopes = prover.network.logits_and_slopes(x0)
    value, slope, _ = (part.tolist() for part in prover.glance(x0, label, target, logits, slopes))
    with mpmath.workdps(60):
        for i in range(4):
            for column in (0, 1):
                f, g = evaluate_exactly(prover.network, x0[i], 0, column + 1)
                assert value[i][column] <= f and mpmath.norm(g) <= slope[i][column]


@pytest.mark.parametrize("activation", crc.ACTIVATIONS)
def test_a_glance_bounds_gradients_and_better_where_it_knows_the_slopes(activation):
    model, generator = thin_model([40, 60, 5], activation, 1.0, 0, rest=0.5)
    prover = Prover.of(read_network(model))
    x = 0.3 * torch.randn(30, 40, generator=generator, dtype=torch.float64)
    label = torch.arange(30) % 5
    target = torch.stack([(label + shift) % 5 for shift in (1, 2, 3, 4)], dim=1)
    logits, _, slopes = prover.network.logits_and_slopes(x)
    knowing, not_knowing = (
        which.glance(x, label, target, logits, slopes)[1]
        for which in (prover, replace(prover, remainder=None))
    )
    for column in range(4):
        _, gradient = prover.network.margin_and_gradient(x, label, target[:, column])
        assert (knowing[:, column] >= gradient.norm(dim=1)).all()
    assert (knowing <= not_knowing).all() and (knowing < 0.97 * not_knowing).any()


@pytest.mark.parametrize("sizes", [[40, 60, 50, 5], [40, 60, 17]], ids=str)
def test_a_glance_knows_the_slopes_only_where_that_is_cheap(sizes):
    model, _ = thin_model(sizes, "softplus", 1.0, 0)
    prover = Prover.of(read_network(model))
    assert prover.sketch is not None and prover.remainder is None


@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.3, 5.0]), st.sampled_from([0.1, 1, 9]))
def test_in_a_box_a_minorant_is_bounded_where_an_adversary_may_go(seed, curvature, radius):
    generator = torch.Generator().manual_seed(seed)
    low, high, direction = torch.randn(3, 8, 3, generator=generator, dtype=torch.float64)
    value = torch.rand(8, generator=generator, dtype=torch.float64)
    k, room = torch.full_like(value, curvature), Room(-low.abs(), high.abs())
    error = torch.full_like(value, 1e-3)
    free, boxed = (Minorant(value, direction, error, k, where) for where in (None, room))
    margin, certified = boxed.margin(radius), boxed.radius()
    assert (margin >= free.margin(radius)).all() and (certified >= free.radius()).all()
    nearest = boxed.nearest(certified)
    assert torch.equal(room.clip(nearest), nearest)
    for _ in range(50):
        reach, noise = torch.randn(2, 8, 3, generator=generator, dtype=torch.float64)
        delta = room.clip(reach.abs() * direction * 3 + noise / 3)
        length = delta.norm(dim=1)
        fall = (direction * delta).sum(1) + error * length + k / 2 * length**2
        assert (value - fall >= margin - 1e-12)[length <= radius].all()
        assert (value - fall >= -1e-12)[length <= certified].all()


def test_a_search_ends_where_the_proof_is_as_good_as_it_guessed():
    model = crc.mlp([5, 20, 3], seed=2).double()
    network = read_network(model)
    prover = Prover.of(network)
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = network.logits(x).argmax(1)
    target = (label + 1) % 3
    k = -crc.curvature_bounds(model, label, target)[0]
    for room in (None, as_box((x.min(), x.max()), x).room(x)):
        pairs = Pairs(x, label, target, k, room)

        def prove(points, pairs=pairs):
            evaluation = network.margin_and_gradient(points, label, target)
            return prover.minorant(pairs, points, *evaluation).radius()

        found, guess = search(network, pairs, x, 200, torch.full_like(k, torch.inf))
        torch.testing.assert_close(prove(found), guess, rtol=1e-6, atol=0)
        assert (prove(found) >= prove(x)).all()
        assert (prove(found) > 1.001 * prove(x)).any()
