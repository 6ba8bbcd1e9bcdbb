"""Balls cut into slabs: every slab's bound holds, and together they see past one minorant."""

from dataclasses import replace

import pytest
import torch
from conftest import EVERY, random_networks
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.attacks import Aim, boundary_points, descend
from crcbook.certificate.question import Margin, Radius
from crcbook.hessian import margin_hessian
from crcbook.networks import read_network
from crcbook.proof import slabs
from crcbook.proof.eigenvalues import top_eigenvalue_bound
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.slabs import slab_margins
from crcbook.stages.search import search
from crcbook.stages.slabs import Slabs


def margins_to_bound(prover, x):
    """Of the largest logits over the second largest."""
    label, target = prover.network.logits(x).topk(2, dim=1).indices.T
    return Entries.of(prover, x, label, target)


def margins_in_balls(prover, entries, radii, axis):
    return slab_margins(prover, replace(entries, valid=radii), axis)


def falls(prover, entries):
    """The displacements of the best quadratics, which show where margins fall."""
    return search(prover.network, Radius(), entries, torch.zeros_like(entries.x), 50)


def points_of_slab(slab, generator, count=200):
    """Random points of the slab of the first pair, many of them at its rim."""
    low, high, radius = slab.low[0], slab.high[0], slab.radius[0]
    axis = slab.axis[0]
    along = low + (high - low) * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    across = torch.randn(count, len(axis), generator=generator, dtype=torch.float64)
    across = across - (across @ axis)[:, None] * axis
    share = torch.rand(count, 1, generator=generator, dtype=torch.float64).sqrt()
    reach = (radius**2 - along**2).clamp(min=0).sqrt()
    across = torch.nn.functional.normalize(across, dim=1) * reach * share
    return slab.entries.x[:1] + along * axis + across


@given(random_networks(activations=EVERY), st.sampled_from([0.05, 0.5, 3.0]), st.booleans())
def test_no_point_of_a_ball_is_below_its_slabs(case, radius, along_the_gradient):
    model, generator = case
    prover = Prover.of(read_network(model))
    network = prover.network
    x = torch.randn(3, network.inputs, generator=generator, dtype=torch.float64)
    entries = margins_to_bound(prover, x)
    axis = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    if along_the_gradient:
        axis = -network.margin_and_gradient(x, entries.label, entries.target)[1]
    axis = axis * torch.tensor([[0.0], [1e-200], [1e200]], dtype=torch.float64)
    radii = torch.full((3,), radius, dtype=torch.float64)
    bound = margins_in_balls(prover, entries, radii, axis)
    axis = torch.nn.functional.normalize(axis.clamp(-1, 1), dim=1)
    for start in (x, x + axis, x - axis):
        _, least = descend(Aim(network, x, entries.label, entries.target), radius, start)
        assert (bound <= least + 1e-12 * (1 + least.abs())).all()


@given(random_networks(activations=EVERY), st.sampled_from([0.5, 3.0]), st.integers(0, 7))
def test_a_slab_knows_its_values_its_units_and_its_curvature(case, radius, place):
    model, generator = case
    prover = Prover.of(read_network(model))
    network = prover.network
    x = torch.randn(1, network.inputs, generator=generator, dtype=torch.float64)
    axis = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    axis = torch.nn.functional.normalize(axis, dim=1)
    radii = torch.tensor([radius], dtype=torch.float64)
    entries = replace(margins_to_bound(prover, x), valid=radii)
    slab = slabs._Slab.of(prover, entries, axis, place / 8, (place + 1) / 8)
    points = points_of_slab(slab, generator)
    every = entries.label.expand(len(points)), entries.target.expand(len(points))
    margins, _ = network.margin_and_gradient(points, *every)
    least = margins.min()
    assert slab.margins()[0] <= least + 1e-12 * (1 + least.abs())
    units = network.preactivations(points)[0]
    low, high = slab._first_preactivations()
    assert (units >= low - 1e-12).all() and (units <= high + 1e-12).all()
    # From the point of expansion c, the margin stays above c's parabola with the slab's curvature.
    d = slab._expansion_points(0.9 * entries.curvature)
    c, (diagonal, upper) = x + d, slab._bends(d)
    top = top_eigenvalue_bound(network.layers[0].weight, diagonal)
    assert slab._top_estimate(d, diagonal) <= top
    curvature = top + upper
    assert slab._with_own_curvature(d) <= least + 1e-12 * (1 + least.abs())
    value, slope = network.margin_and_gradient(c, entries.label, entries.target)
    away = points - c
    parabola = value + away @ slope[0] - curvature / 2 * away.square().sum(1)
    assert (margins >= parabola - 1e-10 * (1 + margins.abs().amax())).all()
    here = margin_hessian(model, c, int(entries.label), int(entries.target))
    assert torch.linalg.eigvalsh(here)[0, 0] >= -curvature - 1e-10 * (1 + curvature)


def test_slabs_prove_what_one_minorant_cannot():
    generator = torch.Generator().manual_seed(0)
    model = crc.mlp([12, 40, 10], "softplus", seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    prover = Prover.of(read_network(model))
    x = torch.rand(40, 12, generator=generator, dtype=torch.float64)
    entries = margins_to_bound(prover, x)
    plain = crc.certify(model, x, entries.label, targets="runner-up").radius
    reached = (boundary_points(Aim(prover.network, x, entries.label, entries.target)) - x).norm(
        dim=1
    )
    gap = (plain < 0.97 * reached).nonzero().squeeze(1)
    assert len(gap) >= 10
    entries, trial = entries.take(gap), (plain + reached)[gap] / 2
    bound = margins_in_balls(prover, entries, trial, falls(prover, entries))
    assert (bound > 0).double().mean() > 0.5
    # The stage does so across either way, and the two ways are not the same.
    question, entries = Margin(trial), replace(entries, valid=trial, image=torch.arange(len(trial)))
    both = [Slabs(prover, ((way, 32),))(question, entries)[0] > 0 for way in ("point", "adversary")]
    assert all(proved.double().mean() > 0.5 for proved in both)
    axes = [Slabs(prover)._axis(way, entries) for way in ("point", "adversary")]
    assert (torch.cosine_similarity(*axes, dim=1) < 1 - 1e-6).any()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_slabs_keep_their_word_at_any_scale(scale):
    model = crc.mlp([30, 20, 3], "tanh", seed=1).double()
    with torch.no_grad():
        model[1].weight.mul_(scale)
    prover = Prover.of(read_network(model))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 30, generator=generator, dtype=torch.float64) / scale
    entries = margins_to_bound(prover, x)
    reached = crc.attack(model, x, entries.label, restarts=3).distance
    axis = falls(prover, entries)
    bound = margins_in_balls(prover, entries, 0.9 * reached, axis)
    assert (bound > 0).sum() >= 4
    attacked = boundary_points(Aim(prover.network, x, entries.label, entries.target))
    beyond = (attacked - x).norm(dim=1) * (1 + 1e-6)
    bound = margins_in_balls(prover, entries, beyond, axis)
    assert not (bound > 0).any()


def test_a_flat_margin_and_an_overflow_are_no_proof():
    model = crc.mlp([3, 4, 2], seed=0).double()
    with torch.no_grad():
        model[3].weight.copy_(model[3].weight[:1].expand(2, -1))  # the margin is a constant
        model[3].bias.copy_(torch.tensor([1.0, 0.0]))
    prover = Prover.of(read_network(model))
    entries = margins_to_bound(prover, torch.zeros(1, 3, dtype=torch.float64))
    axis, radii = torch.ones(1, 3, dtype=torch.float64), torch.tensor([5.0, 1e200]).double()
    assert margins_in_balls(prover, entries, radii[:1], axis)[0] == pytest.approx(1.0)
    assert margins_in_balls(prover, entries, radii[1:], axis)[0] <= 1.0
    huge = Entries.of(prover, entries.x + 1e300, entries.label, entries.target)
    huge = replace(huge, curvature=huge.curvature + 1e200)
    assert margins_in_balls(prover, huge, radii[:1], axis)[0] <= 0
