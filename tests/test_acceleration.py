"""The acceleration of fixed-point iterations."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from crcbook.acceleration import Acceleration


def affine_maps(count: int, size: int, scale: float, seed: int):
    """Maps c -> cA + b with eigenvalues of any size up to the scale, and their fixed points."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices, ends = scale * normal(count, size, size), normal(count, size)

    def full_steps(c, index=slice(None)):
        return ((c - ends[index])[:, None] @ matrices[index]).squeeze(1) - (c - ends[index])

    return full_steps, matrices, ends


@given(st.floats(0.1, 20), st.integers(0, 2**31))
def test_affine_maps_of_the_plane_are_solved_in_three_steps(scale, seed):
    full_steps, matrices, ends = affine_maps(8, 2, scale, seed)
    # Three residuals must not lie on a line, or two of them count as one.
    identity = torch.eye(2, dtype=torch.float64)
    assume((torch.linalg.cond(identity - matrices) < 10).all())
    c, acceleration, moves = torch.zeros(8, 2, dtype=torch.float64), Acceleration(), []
    for _ in range(3):
        moves.append(full_steps(c))
        c = c + acceleration.step(c, moves[-1])
    changes = torch.stack([moves[1] - moves[0], moves[2] - moves[1]], dim=1)
    sine = torch.linalg.det(changes).abs() / changes.norm(dim=2).prod(1)
    apart = sine > 0.05
    assert torch.allclose(c[apart], ends[apart], atol=1e-8 * (1 + scale) ** 2)


@pytest.mark.parametrize("power", [-40, 40])
def test_the_unit_of_the_points_does_not_matter(power):
    full_steps, _, ends = affine_maps(8, 3, 0.5, seed=2)
    steps = []
    for size in (1.0, 2.0**power):
        c, acceleration = torch.zeros_like(ends, dtype=torch.float32), Acceleration()
        for _ in range(4):
            c = c + acceleration.step(c, size * full_steps(c.double() / size).float())
        steps.append(c / size)
    assert torch.equal(*steps) and not torch.equal(steps[0], torch.zeros_like(c))


def test_it_converges_where_repeating_the_map_diverges():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 6, 6, generator=generator, dtype=torch.float64)
    axes, eigenvalues = torch.linalg.qr(normal).Q, torch.linspace(-1.5, 0.8, 6).double()
    matrices = axes * eigenvalues @ axes.mT  # of steepest descent on a convex quadratic
    ends = normal[:, 0]
    c, acceleration = torch.zeros_like(ends), Acceleration()
    repeated = c
    for _ in range(60):
        repeated = ends + ((repeated - ends)[:, None] @ matrices).squeeze(1)
        move = ((c - ends)[:, None] @ matrices).squeeze(1) - (c - ends)
        c = c + acceleration.step(c, move)
    assert (repeated - ends).norm(dim=1).min() > 1e6
    assert (c - ends).norm(dim=1).max() < 1e-4


def test_iterations_do_not_know_of_each_other():
    full_steps, _, ends = affine_maps(5, 3, 0.5, seed=1)
    index = torch.tensor([3, 0])
    c, acceleration = torch.zeros_like(ends), Acceleration()
    for turn in range(6):
        if turn == 3:
            few, fewer = c[index], acceleration.take(index)
        if turn >= 3:
            few = few + fewer.step(few, full_steps(few, index))
        c = c + acceleration.step(c, full_steps(c))
    assert torch.equal(few, c[index])


def test_what_has_settled_stays():
    c, acceleration = torch.ones(2, 3), Acceleration()
    for _ in range(4):
        step = acceleration.step(c, torch.zeros_like(c))
        assert (step == 0).all()
