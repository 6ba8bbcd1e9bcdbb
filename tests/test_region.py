"""Steps end where they should, in a box or without one."""

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from crcbook.proof.box import Box, Room, step_to_boundary, step_to_sphere

SEEDS = st.integers(0, 2**31 - 1)


def rooms(seed):
    """Gradients, and rooms of three coordinates, some of which have none."""
    generator = torch.Generator().manual_seed(seed)
    gradient, low, high = torch.randn(3, 20, 3, generator=generator, dtype=torch.float64)
    return gradient, Room(low.clamp(max=0), high.clamp(min=0))


@given(SEEDS, st.booleans())
def test_a_step_to_the_boundary_ends_on_it_or_nowhere(seed, boxed):
    gradient, room = rooms(seed)
    margin = gradient.norm(dim=1) / 2
    eta = step_to_boundary(margin, gradient, room if boxed else None)
    far = torch.where(gradient > 0, room.low, room.high)
    reached = (margin + (gradient * far).sum(1) < -1e-9) if boxed else margin > 0
    step = -eta[:, None] * gradient
    left = margin + (gradient * (room.clip(step) if boxed else step)).sum(1)
    assert (left.abs() < 1e-9)[reached].all()
    assert (~reached | eta.isfinite()).all() and (eta >= 0).all()
    assert eta[margin + (gradient * far).sum(1) > 1e-9].isinf().all() or not boxed


@given(SEEDS, st.booleans(), st.sampled_from([0.1, 1.0, 3.0]))
def test_a_step_to_the_sphere_has_its_length_or_no_end(seed, boxed, radius):
    gradient, room = rooms(seed)
    eta = step_to_sphere(gradient, radius, room if boxed else None)
    far = torch.where(gradient > 0, room.low, room.high).norm(dim=1)
    step = -eta.clamp(max=1e9)[:, None] * gradient
    length = (room.clip(step) if boxed else step).norm(dim=1)
    wanted = far.clamp(max=radius) if boxed else torch.full_like(far, radius)
    torch.testing.assert_close(length, wanted)


@given(SEEDS)
def test_a_room_holds_every_displacement_that_stays_in_the_box(seed):
    generator = torch.Generator().manual_seed(seed)
    x, ends = torch.rand(2, 3, generator=generator), torch.rand(2, 3, generator=generator)
    box = Box(-ends[0].double() / 3, 1 + ends[1].double() / 3)
    room = box.room(x.double())
    for item, low, high in zip(x.tolist(), room.low.tolist(), room.high.tolist(), strict=True):
        ends = zip(item, low, high, box.lower.tolist(), box.upper.tolist(), strict=True)
        for at, down, up, lower, upper in ends:
            assert Fraction(down) <= Fraction(lower) - Fraction(at)
            assert Fraction(upper) - Fraction(at) <= Fraction(up)
    assert (room.clip(torch.full_like(room.low, 9)).norm(dim=1) <= room.reach()).all()
