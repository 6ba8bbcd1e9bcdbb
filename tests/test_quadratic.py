"""What quadratics prove, beside the same in rational arithmetic: rounding takes, never adds."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crcbook.proof.arithmetic import DOUBLE, SINGLE
from crcbook.proof.box import Allowed
from crcbook.proof.quadratic import Parabola, Quadratic

SIZES = st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30])


def numbers(generator, count, size=1.0):
    return size * torch.randn(count, generator=generator, dtype=torch.float64)


@given(st.integers(0, 2**31 - 1), SIZES, SIZES)
def test_a_parabola_is_rounded_down(seed, unit, height):
    generator = torch.Generator().manual_seed(seed)
    value, slope, curvature, radius = (numbers(generator, 32).abs() for _ in range(4))
    value, slope, curvature = value * height, slope * height / unit, curvature * height / unit**2
    # Where the parabola is near zero, what is left of the value is digits alone.
    parabola = Parabola(value, slope, curvature)
    radii = torch.cat([radius * unit, parabola.radius()])
    tall = Parabola(value.repeat(2), slope.repeat(2), curvature.repeat(2))
    for q, s, k, r, low in zip(
        *(tall.value, tall.slope, tall.curvature, radii, tall.margin(radii)), strict=True
    ):
        q, s, k, r = (Fraction(float(number)) for number in (q, s, k, r))
        assert Fraction(float(low)) <= q - s * r - k * r * r / 2
    for q, s, k, r in zip(value, slope, curvature, parabola.radius(), strict=True):
        q, s, k, r = (Fraction(float(number)) for number in (q, s, k, r))
        assert q - s * r - k * r * r / 2 >= 0


@pytest.mark.parametrize("arithmetic", [DOUBLE, SINGLE], ids=["double", "single"])
@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.sampled_from([1e-12, 1e-6, 1.0, 1e3]))
def test_a_quadratic_is_nowhere_lower_in_a_box_than_its_smallest_value(arithmetic, seed, n, share):
    """The multiplier is drawn near the curvature, where the minimiser is in the box's corners."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -numbers(generator, n).abs(), numbers(generator, n).abs()
    direction = numbers(generator, n).to(arithmetic.dtype)
    value, curvature = numbers(generator, 1), numbers(generator, 1).abs()
    multiplier = curvature * (1 + share * numbers(generator, 1).abs())
    allowed = Allowed(low[None], high[None])
    quadratic = Quadratic(
        value, direction[None], torch.zeros(1).double(), curvature, allowed, arithmetic
    )
    found = Fraction(float(quadratic._smallest(multiplier)))
    rise = Fraction(float(multiplier)) - Fraction(float(curvature))
    least = Fraction(float(value))
    for s, begin, end in zip(direction.tolist(), low.tolist(), high.tolist(), strict=True):
        s, begin, end = Fraction(s), Fraction(begin), Fraction(end)
        delta = end if s > 0 else begin
        delta = delta if rise == 0 else min(max(s / rise, begin), end)
        least += -s * delta + rise * delta * delta / 2
    assert found <= least
    size = abs(least) + sum(abs(s) for s in direction.tolist()) * float(allowed.longest())
    assert float(least - found) <= 1e-12 * n * (1 + float(size))
