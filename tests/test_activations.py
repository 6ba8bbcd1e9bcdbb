"""The table of activations, proved from derivatives and high precision."""

import math

import mpmath
import pytest
import torch
from conftest import EXACT as SIX_EXACT
from conftest import ROWS as SIX
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crcbook.activations import ACTIVATIONS, OTHER_ACTIVATIONS, ROUNDING, Arctan, celu, softplus
from crcbook.networks.modules import activation_module, activation_of
from crcbook.proof.lines import enclosing_lines


def exact_celu(alpha):
    return lambda z: z if z > 0 else alpha * mpmath.expm1(z / alpha)


ROWS = {**SIX, **OTHER_ACTIVATIONS, "celu(0.5)": celu(0.5), "celu(3)": celu(3.0)}
EXACT = {
    **SIX_EXACT,
    "gelu-tanh": lambda z: (
        z / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf(0.044715) * z**3)))
    ),
    "mish": lambda z: z * mpmath.tanh(mpmath.log1p(mpmath.exp(z))),
    "elu": exact_celu(1),
    "celu(0.5)": exact_celu(mpmath.mpf(0.5)),
    "celu(3)": exact_celu(3),
    "logsigmoid": lambda z: -mpmath.log1p(mpmath.exp(-z)),
    "softsign": lambda z: z / (1 + abs(z)),
}
JUMPS = {"elu", "celu(0.5)", "celu(3)", "softsign"}  # of the bend, at 0
BESIDE_ZERO = torch.tensor([-1e-13, 1e-13], dtype=torch.float64)
GRID = torch.linspace(-60, 60, 40_001, dtype=torch.float64)


@pytest.mark.parametrize("name", ROWS)
def test_slope_and_bend_are_the_derivatives(name):
    row = ROWS[name]
    z = GRID.clone().requires_grad_()
    (slope,) = torch.autograd.grad(row.value(z).sum(), z, create_graph=True)
    torch.testing.assert_close(row.slope(GRID), slope.detach(), rtol=1e-9, atol=1e-12)
    z = GRID.clone().requires_grad_()
    (bend,) = torch.autograd.grad(row.slope(z).sum(), z)
    torch.testing.assert_close(row.bend(GRID), bend, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_float64_is_within_rounding_of_the_truth(name):
    row, exact = ROWS[name], EXACT[name]
    points = [-40.0, -12.3, -3.7, -1.0, -1e-3, 0.0, 1e-8, 0.4, 2.2, 7.9, 19.9, 35.0]
    z = torch.tensor(points, dtype=torch.float64)
    at_zero = abs(float(row.value(z[5:6])))
    with mpmath.workdps(60):
        for order, function, scale in [
            (0, row.value, lambda z: row.max_slope * abs(z) + at_zero),
            (1, row.slope, lambda z: row.max_slope),
            (2, row.bend, lambda z: row.max_bend),
        ]:
            for point, computed in zip(points, function(z).tolist(), strict=True):
                if order == 2 and point == 0 and name in JUMPS:
                    continue
                truth = mpmath.diff(exact, mpmath.mpf(point), order)
                assert abs(computed - truth) <= ROUNDING * scale(point)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("function", ["value", "slope", "bend"])
def test_extrema_are_stationary_and_complete(name, function):
    row = ROWS[name]
    # Further out, the functions are flat to within rounding.
    grid = GRID[GRID.abs() < (6 if name == "gelu-tanh" else 7)]
    values = getattr(row, function)(grid)
    turning = grid[1:-1][values.diff().sign().diff().abs() == 2]
    extrema = torch.tensor(getattr(row, f"{function}_extrema"), dtype=torch.float64)
    for point in extrema:
        if function == "bend" and name in JUMPS:  # what the bend tends to on that side of 0
            beside = row.bend(point.sign() * 1e-12)
            torch.testing.assert_close(row.bend(point), beside, rtol=1e-9, atol=0)
            continue
        z = point.clone().requires_grad_()
        (derivative,) = torch.autograd.grad(getattr(row, function)(z), z)
        assert abs(float(derivative)) < 1e-8
    spacing = float(grid[1] - grid[0])
    assert len(turning) >= len(extrema)
    for point in turning:  # every turn on a fine grid is one the table lists
        assert (extrema - point).abs().min() <= 1.5 * spacing


@pytest.mark.parametrize("name", ROWS)
def test_line_ranges_are_sound_and_tight(name):
    row = ROWS[name]
    for function, (lowest, highest) in [
        (row.slope, row.slope_range),
        (row.bend, row.bend_range),
        (row.value, row.value_range),
    ]:
        values = function(GRID)
        assert lowest <= values.min() and values.max() <= highest
    for function, (lowest, highest) in [(row.slope, row.slope_range), (row.bend, row.bend_range)]:
        grid = torch.linspace(-999, 999, 2_000_001, dtype=torch.float64)
        values = function(torch.cat([grid, BESIDE_ZERO]))
        torch.testing.assert_close(
            values.min(), torch.tensor(lowest, dtype=torch.float64), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            values.max(), torch.tensor(highest, dtype=torch.float64), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "slope", "bend"),
    [
        ("softplus", 1.0, 1 / 4),
        ("sigmoid", 1 / 4, 1 / (6 * math.sqrt(3))),
        ("tanh", 1.0, 4 / (3 * math.sqrt(3))),
        ("arctan", 1.0, 3 * math.sqrt(3) / 8),
        ("silu", None, 1 / 2),
        ("gelu", None, 2 / math.sqrt(2 * math.pi)),
    ],
)
def test_constants_have_their_closed_forms(name, slope, bend):
    row = ACTIVATIONS[name]
    assert row.max_bend == pytest.approx(bend, rel=1e-14)
    if slope is not None:
        assert row.max_slope == pytest.approx(slope, rel=1e-14)


@pytest.mark.parametrize("name", ROWS)
@given(center=st.floats(-8, 8), width=st.floats(0, 10))
def test_interval_ranges_contain_and_touch_every_value(name, center, width):
    row = ROWS[name]
    lower, upper = torch.tensor([[center], [center + width]], dtype=torch.float64)
    inside = torch.linspace(center, center + width, 2001, dtype=torch.float64)
    jumps = BESIDE_ZERO[(center <= BESIDE_ZERO) & (center + width >= BESIDE_ZERO)]
    inside = torch.cat([inside, jumps])
    for function, interval in [
        (row.value, row.value_interval),
        (row.slope, row.slope_interval),
        (row.bend, row.bend_interval),
    ]:
        values = function(inside)
        lowest, highest = interval(lower, upper)
        assert lowest <= values.min() and values.max() <= highest
        fineness = 20 * (width / 2000) ** 2 + 1e-12  # what lies between grid points near a peak
        assert lowest >= values.min() - 5 * fineness and highest <= values.max() + 5 * fineness


@pytest.mark.parametrize("threshold", [20.0, 5.0, 0.0, -3.0])
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_softplus_deviation_covers_torchs_threshold(beta, threshold):
    row = softplus(beta, threshold)
    z = torch.linspace(-30, 30, 200_001, dtype=torch.float64) / beta
    gap = (nn.Softplus(beta, threshold)(z) - row.value(z)).abs()
    assert 0.9 * row.deviation < gap.max() <= row.deviation
    assert gap[z < row.deviates_from].max() < 1e-12


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_module_and_row_agree(name):
    module = activation_module(name)
    row = activation_of(module)
    assert row.name == name
    z = torch.linspace(-15, 15, 1001, dtype=torch.float64)
    torch.testing.assert_close(module(z), row.value(z), rtol=1e-12, atol=1e-14)


def test_settings_without_a_proof_are_refused():
    for beta in (-1, 0, 1e-21, 1e21, math.nan):
        with pytest.raises(ValueError, match="needs beta from"):
            activation_of(nn.Softplus(beta=beta))
        with pytest.raises(ValueError, match="needs alpha from"):
            celu(beta)
    for threshold in (-1e3, math.nan):
        with pytest.raises(ValueError, match="needs a threshold"):
            softplus(threshold=threshold)
    with pytest.raises(ValueError, match="one of softplus"):
        activation_module("relu")
    assert activation_of(nn.ReLU()) is None
    assert activation_of(nn.GELU(approximate="tanh")) is OTHER_ACTIVATIONS["gelu-tanh"]
    assert isinstance(activation_module("arctan"), Arctan)


@pytest.mark.parametrize("name", [*OTHER_ACTIVATIONS, "celu(0.5)", "celu(3)"])
@given(centre=st.floats(-6, 6), width=st.floats(0, 8))
def test_lines_enclose_the_other_activations(name, centre, width):
    """What CROWN needs of a row, jumps of the bend included."""
    lower, upper = torch.tensor([[centre], [centre + width]], dtype=torch.float64)
    lines = enclosing_lines(ROWS[name], lower, upper)
    z = torch.linspace(centre, centre + width, 1001, dtype=torch.float64)[:, None]
    values = ROWS[name].value(z)
    slack = 1e-12 * (1 + abs(centre) + width)
    assert (lines.low_slope * z + lines.low_offset <= values + slack).all()
    assert (lines.high_slope * z + lines.high_offset >= values - slack).all()


@pytest.mark.parametrize("name", [*OTHER_ACTIVATIONS, "celu(0.5)", "celu(3)"])
def test_the_others_in_float32_are_within_rounding_too(name):
    """What proofs in single precision assume of a row."""
    row, z = ROWS[name], torch.linspace(-90, 90, 60_001)
    exact, unit = z.double(), ROUNDING * 2.0**29
    scale = row.max_slope * exact.abs() + row.value(exact.new_zeros(1)).abs()
    assert ((row.value(z).double() - row.value(exact)).abs() <= unit * scale).all()
    assert ((row.slope(z).double() - row.slope(exact)).abs() <= unit * row.max_slope).all()
