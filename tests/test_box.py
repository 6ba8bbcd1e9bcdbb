"""What a box leaves an adversary is never less than it should be."""

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from crcbook.proof.box import Box, clip


@given(st.integers(0, 2**31 - 1))
def test_every_displacement_that_stays_in_the_box_is_allowed(seed):
    generator = torch.Generator().manual_seed(seed)
    x, ends = torch.rand(2, 3, generator=generator), torch.rand(2, 3, generator=generator)
    box = Box(-ends[0].double() / 3, 1 + ends[1].double() / 3)
    allowed = box.around(x.double())
    for item, low, high in zip(
        x.tolist(), allowed.low.tolist(), allowed.high.tolist(), strict=True
    ):
        ends = zip(item, low, high, box.lower.tolist(), box.upper.tolist(), strict=True)
        for at, down, up, lower, upper in ends:
            assert Fraction(down) <= Fraction(lower) - Fraction(at)
            assert Fraction(upper) - Fraction(at) <= Fraction(up)
    far = torch.full_like(allowed.low, 9)
    for corner in (far, -far):
        assert (allowed.clip(corner).norm(dim=1) <= allowed.longest()).all()
    one = allowed.take(torch.tensor([False, True]))
    assert torch.equal(one.low, allowed.low[1:]) and torch.equal(one.high, allowed.high[1:])


def test_clipping_moves_to_the_nearest_valid_point_and_nowhere_without_a_box():
    point = torch.tensor([[-1.0, 0.5, 2.0]])
    box = Box(torch.zeros(3), torch.tensor([1.0, 1.0, 1.5]))
    assert clip(box, point).tolist() == [[0.0, 0.5, 1.5]]
    assert clip(None, point) is point
