"""The theorem as the book teaches it, and the engine held to it."""

import pytest
import torch
from conftest import SMOOTH, margin_hessian, random_networks
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook import theorem
from crcbook.networks import read_network
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.rounding import MarginFacts


def margin_of(model, label, target):
    def f(x):
        logits = model(x[None])[0]
        return logits[label] - logits[target]

    return f


def one(number):
    return torch.tensor([number])


@given(random_networks(), st.sampled_from([0.0, 0.3, 2.0]))
def test_a_parabola_lies_below_the_margin_and_touches_it(case, reach):
    model, generator = case
    x0, way, far = torch.randn(3, model[1].in_features, generator=generator, dtype=torch.float64)
    c, f = x0 + reach * way, margin_of(model, 0, 1)
    k = float(-crc.curvature_bounds(model, 0, 1)[0])
    q, s = theorem.parabola(f, x0, c, k)

    def below(x):
        return q - s @ (x - x0) - k / 2 * (x - x0).square().sum()

    scale = 1 + q.abs() + k * (1 + reach) ** 2 * way.square().sum()
    assert (below(c) - f(c)).abs() <= 1e-9 * scale
    for step in (0.1, 1.0, 10.0):
        point = x0 + step * far
        assert below(point) <= f(point) + 1e-9 * (scale + k * step**2 * far.square().sum())


@given(random_networks(), st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([0.01, 0.5]))
def test_the_engine_proves_what_the_theorem_says_and_no_more(case, reach, rho):
    model, generator = case
    x0, way = torch.randn(2, 1, model[1].in_features, generator=generator, dtype=torch.float64)
    prover = Prover.of(read_network(model))
    entries = Entries.of(prover, x0, one(0), one(1))
    quadratic, _ = prover.prove(entries, reach * way)
    k = float(entries.curvature)
    q, s = theorem.parabola(margin_of(model, 0, 1), x0[0], (x0 + reach * way)[0], k)
    q, s = q.detach(), s.detach()
    size = float(q.abs() + k * (reach * way).square().sum() + s.norm() + 1)
    deviation = float(MarginFacts.of(prover.rounding, one(0), one(1)).deviation)
    engine, exact = (
        quadratic.margin(torch.tensor([rho], dtype=torch.float64)),
        theorem.smallest_margin(q, s, k, rho),
    )
    assert exact - 1e-8 * size - 2 * deviation <= engine <= exact + 1e-12 * size + deviation
    assert quadratic.radius() <= theorem.radius(q + 1e-12 * size + deviation, s, k) * (1 + 1e-9)
    assert quadratic.radius() >= theorem.radius(q - 1e-8 * size - 2 * deviation, s, k) * (1 - 1e-6)


@pytest.mark.parametrize("activation", SMOOTH)
def test_two_layers_bend_no_more_than_the_extreme_diagonals_say(activation):
    model = crc.mlp([4, 9, 3], activation, seed=2).double()
    W, w = model[1].weight.detach(), (model[3].weight[0] - model[3].weight[2]).detach()
    m, M = theorem.curvature_of_two_layers(W, w, crc.ACTIVATIONS[activation].bend_range)
    for x in torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        eigenvalues = torch.linalg.eigvalsh(margin_hessian(model, x, 0, 2))
        assert m - 1e-12 <= eigenvalues[0] and eigenvalues[-1] <= M + 1e-12
    engine = crc.curvature_bounds(model, 0, 2)
    assert [float(end) for end in engine] == pytest.approx([m, M], rel=1e-6, abs=1e-9)
    assert engine[0] <= m and engine[1] >= M


def test_a_radius_that_is_the_distance():
    # f = 2 - x1 - x1^2 / 2 has its nearest zero at sqrt(5) - 1, and k = 1.
    f = lambda x: 2 - x[0] - x[0] ** 2 / 2  # noqa: E731
    q, s = theorem.parabola(f, torch.zeros(2), torch.tensor([0.7, 0.0]), 1.0)
    assert theorem.radius(q, s, 1.0).item() == pytest.approx(5**0.5 - 1, rel=1e-6)
    assert theorem.smallest_margin(q, s, 1.0, 1.0).item() == pytest.approx(0.5, rel=1e-6)
    assert theorem.radius(-q, s, 1.0) == 0
