"""Cheap bounds of gradients are never too small, and tight where they can be."""

from functools import partial

import numpy as np
import torch
from conftest import EVERY, every_pair, random_networks, thin_model
from hypothesis import assume, given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.networks import read_network
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.sketches import Glance, NormSketch, Reduced, Remainder


def spectral_norm(matrix):
    return float(torch.linalg.svdvals(matrix)[0])


@given(
    outputs=st.integers(6, 40), inputs=st.integers(6, 40), rank=st.integers(1, 4),
    scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_sketch_bounds_the_norms_of_products(outputs, inputs, rank, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    weight = scale * (normal(outputs, rank) @ normal(rank, inputs))
    weight = weight + 1e-3 * scale * normal(outputs, inputs)
    sketch = NormSketch.of(weight)
    assume(sketch is not None)
    v = normal(50, 3, outputs) * torch.tensor([1e-9, 1.0, 1e9])[:, None]
    true, size = (v @ weight).norm(dim=2), spectral_norm(weight)
    for dtype, accuracy in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        way, bound = sketch.norms(v.to(dtype))
        assert (bound >= true * (1 - 1e-14)).all()
        length = size * v.norm(dim=2)
        assert (bound <= true + (0.201 + 10 * accuracy) * length + 2e-16 * (1 + size)).all()
        expected = v @ weight @ sketch.basis
        error = (way.double() / sketch.shrink - expected).norm(dim=2)
        assert (error <= accuracy * length).all()
    assert spectral_norm(sketch.basis) <= 1 + 1e-6


@given(
    outputs=st.integers(6, 40), inputs=st.integers(6, 40), size=st.integers(1, 5),
    spread=st.sampled_from([0.0, 0.1, 3.0]), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_remainder_bounds_what_a_sketch_leaves_out(outputs, inputs, size, spread, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    weight = normal(outputs, 3) @ normal(3, inputs) + 0.1 * normal(outputs, inputs)
    sketch = NormSketch.of(weight)
    assume(sketch is not None)
    near, rows = normal(outputs, size), scale * normal(4, outputs)
    rows[0] = 0
    s = normal(20, size) @ near.T + spread * normal(20, outputs)
    remainder = Remainder.of(weight, sketch, rows, near)
    # A difference of squares, for which float64 has too few digits.
    products = rows.numpy().astype(np.longdouble) * s.numpy()[:, None]
    parts = [((products @ part.numpy()) ** 2).sum(2) for part in (weight, sketch.factor)]
    true = torch.from_numpy(np.sqrt((parts[0] - parts[1]).clip(min=0)).astype(np.float64))
    most = sketch.rest**0.5 * (rows * s[:, None]).norm(dim=2)
    error = 1e-8 * scale * s.norm(dim=1, keepdim=True)
    assert (true <= most + error).all()
    for dtype, accuracy in ((torch.float64, 1e-5), (torch.float32, 1e-2)):
        bound = remainder.to(dtype).norms(s.to(dtype))
        assert (bound >= true - error).all()
        if spread == 0:  # nothing left to bound
            assert (bound <= true + accuracy * scale * size * s.norm(dim=1, keepdim=True)).all()


def test_a_remainder_beats_the_bound_of_any_vector_and_never_hides_an_overflow():
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    weight = normal(60, 5) @ normal(5, 50) + 0.1 * normal(60, 50)
    sketch, near, rows = NormSketch.of(weight), normal(60, 2), normal(3, 60)
    s = (normal(20, 2) @ near.T).float()
    remainder = Remainder.of(weight, sketch, rows, near).to(torch.float32)
    rest = remainder.norms(s)
    assert (rest < 0.7 * sketch.rest**0.5 * (rows * s[:, None]).norm(dim=2)).all()
    (_, without), (_, within) = (sketch.norms(rows * s[:, None], r) for r in (torch.inf, rest))
    assert (within < without).all()
    assert (within >= (rows * s[:, None] @ weight).norm(dim=2)).all()
    for factor in (1e25, torch.inf, torch.nan):
        assert not remainder.norms(s * factor).isfinite().any()
    # A form of 4e36, of terms of which the one below zero alone is beyond float32.
    v = torch.tensor([-3.6] + 7 * [0.52])
    form, one = 1e8 * v[:, None] * v / v.sum(), torch.ones(1, dtype=torch.float64)
    remainder = Remainder(torch.eye(8), form, torch.ones(1, 8), one, form.norm() * one, 0.0, 1.0)
    assert not remainder.norms(torch.full((1, 8), 1e15)).isfinite()


def test_a_sketch_is_tight_where_the_rest_is_small_and_none_where_nothing_is():
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    weight = normal(60, 5) @ normal(5, 50)
    v = normal(20, 60)
    _, bound = NormSketch.of(weight).norms(v)
    assert torch.allclose(bound, (v @ weight).norm(dim=1), rtol=1e-3)
    assert NormSketch.of(torch.eye(30, dtype=torch.float64)) is None
    assert NormSketch.of(torch.zeros(30, 30, dtype=torch.float64)) is None
    assert NormSketch.of(weight).norms(v * torch.inf)[1].isinf().all()
    tiny = NormSketch.of(weight * 1e-30).norms(v.float() * 1e-25)[1]
    assert (tiny >= 1e-55 * bound).all()  # where float32 sees nothing but zeros


def glanced(model, x):
    """All margins at inputs: what a glance says of them, and what a proof in full does."""
    prover, classes = Prover.of(read_network(model)), model[-1].out_features
    logits, _, slopes = prover.network.logits_and_slopes(x)
    item, label, target = every_pair(classes, logits.argmax(1))
    columns = label.reshape(len(x), -1)[:, 0], target.reshape(len(x), -1)
    found = Glance.of(prover).look(x, *columns, logits, slopes)
    entries = Entries.of(prover, x[item], label, target)
    return [part.flatten(0, 1) for part in found], *prover.prove(entries, torch.zeros_like(x[item]))


@given(random_networks(activations=EVERY), st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_glance_never_sees_more_than_a_proof_allows(case, spread):
    model, generator = case
    inputs = model[1].in_features
    x = spread * torch.randn(3, inputs, generator=generator, dtype=torch.float64)
    (value, slope, _), quadratic, evaluation = glanced(model, x)
    assert (value <= evaluation.margin).all()
    assert (slope >= evaluation.gradient.norm(dim=1) * (1 - 1e-12)).all()
    lost = 1e-9 * (1 + spread) * (1 + slope)  # the deviation of torch's softplus is below
    assert (value >= quadratic.value - lost - 1e-6).all()


def test_a_glance_of_a_thin_network_is_nearly_the_gradient():
    for sizes in ([30, 24, 6], [30, 24, 12, 6]):
        model, generator = thin_model(sizes, "softplus", 1.0, seed=0, rest=0.01)
        x = torch.randn(20, 30, generator=generator, dtype=torch.float64)
        (_, slope, way), _, evaluation = glanced(model, x)
        assert way.shape[1] == 2  # as many directions as count
        true = evaluation.gradient.norm(dim=1)
        assert (slope >= true * (1 - 1e-12)).all() and (slope <= 1.1 * true).all()


def test_a_margin_that_is_positive_everywhere_is_seen_to_be():
    model = crc.mlp([2, 4, 3], "tanh", seed=0).double()
    with torch.no_grad():
        model[3].bias.copy_(torch.tensor([100.0, 0.0, 100.0]))
    glance = Glance.of(Prover.of(read_network(model)))
    pairs = torch.tensor([[0, 1, 0], [1, 0, 2]])
    lowest = glance.lowest(*pairs)
    weight = model[3].weight.detach()
    expected = 100 - (weight[0] - weight[1]).abs().sum()  # tanh is within 1
    assert 0 <= expected - lowest[0] <= 1e-9
    assert (lowest[1:] < 0).all()
    unbounded = Glance.of(Prover.of(read_network(crc.mlp([2, 4, 3], "softplus", seed=0).double())))
    assert unbounded.lowest(*pairs).isinf().any()


@given(
    inputs=st.integers(8, 200),
    share=st.floats(0.05, 0.5),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 1000),
)
def test_a_change_along_the_basis_is_within_its_error(inputs, share, scale, seed):
    """Of displacements as they are stored: what rounding moved them by goes through the weight."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, int(share * inputs))
    weight = torch.randn(inputs, rank, generator=generator) @ torch.randn(
        rank, inputs, generator=generator
    )
    model = crc.mlp([inputs, inputs, 3], seed=seed)
    with torch.no_grad():
        model[1].weight.copy_(scale * weight / spectral_norm(weight))
    prover = Prover.of(read_network(model))
    assume(prover.single is not None and Glance.of(prover).sketch is not None)
    reduced = Reduced.of(prover)
    u = 10 * torch.randn(50, reduced.basis.shape[1], generator=generator)
    d, change = reduced.displaced(u)
    exact = d.double() @ prover.network.layers[0].weight.T
    away = (change.value.double() - exact).norm(dim=1)
    assert (away <= change.error).all()
    size = float(prover.network.layers[0].weight.norm()) * u.norm(dim=1).double()
    assert (change.error <= 2e-7 * (2 + reduced.basis.shape[1]) ** 1.5 * size + 1e-20).all()
