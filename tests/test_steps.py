"""Steps end where they should, in a box or without one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from crcbook.proof.box import Allowed
from crcbook.steps import step_to_boundary, step_to_sphere

SEEDS = st.integers(0, 2**31 - 1)


def boxes(seed):
    """Gradients, and boxes of three coordinates, some of which leave no room."""
    generator = torch.Generator().manual_seed(seed)
    gradient, low, high = torch.randn(3, 20, 3, generator=generator, dtype=torch.float64)
    return gradient, Allowed(low.clamp(max=0), high.clamp(min=0))


@given(SEEDS, st.booleans())
def test_a_step_to_the_boundary_ends_on_it_or_nowhere(seed, boxed):
    gradient, allowed = boxes(seed)
    margin = gradient.norm(dim=1) / 2
    eta = step_to_boundary(margin, gradient, allowed if boxed else None)
    far = torch.where(gradient > 0, allowed.low, allowed.high)
    reached = (margin + (gradient * far).sum(1) < -1e-9) if boxed else margin > 0
    step = -eta[:, None] * gradient
    left = margin + (gradient * (allowed.clip(step) if boxed else step)).sum(1)
    assert (left.abs() < 1e-9)[reached].all()
    assert (~reached | eta.isfinite()).all() and (eta >= 0).all()
    assert eta[margin + (gradient * far).sum(1) > 1e-9].isinf().all() or not boxed


@given(SEEDS, st.booleans(), st.sampled_from([0.1, 1.0, 3.0]))
def test_a_step_to_the_sphere_has_its_length_or_no_end(seed, boxed, radius):
    gradient, allowed = boxes(seed)
    eta = step_to_sphere(gradient, radius, allowed if boxed else None)
    far = torch.where(gradient > 0, allowed.low, allowed.high).norm(dim=1)
    step = -eta.clamp(max=1e9)[:, None] * gradient
    length = (allowed.clip(step) if boxed else step).norm(dim=1)
    wanted = far.clamp(max=radius) if boxed else torch.full_like(far, radius)
    torch.testing.assert_close(length, wanted)
