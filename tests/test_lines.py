"""CROWN: lines that enclose their activations, margins no attack goes below, exact corner cases."""

import math
import sys
from functools import partial

import mpmath
import pytest
import torch
from conftest import EVERY, EXACT, ROWS, evaluate_exactly, every_pair, random_networks
from hypothesis import given, settings
from hypothesis import strategies as st

import crcbook as crc
from crcbook.activations import IDENTITY
from crcbook.networks import read_network
from crcbook.proof import lines as module
from crcbook.proof.lines import Balls, crown_margin, crown_radius, enclosing_lines
from crcbook.proof.parabolas import BentBalls
from crcbook.proof.prover import Prover
from crcbook.stages.parabola_search import good_parabolas

CENTRES = st.one_of(st.floats(-6, 6), st.floats(-1e3, 1e3), st.sampled_from([-1e6, 0.0, 1e6]))
WIDTHS = st.one_of(
    st.floats(0, 12), st.sampled_from([0.0, 1e-15, 1e-12, 1e-8, 1e-3, 50.0, 1e3, 1e7])
)


def interval(centre, width):
    ends = torch.tensor([[centre - width / 2], [centre + width / 2]], dtype=torch.float64)
    return ends[0], ends[1]


def inside(lower, upper):
    """Points of an interval, many of them where activations turn."""
    even = torch.linspace(lower.item(), upper.item(), 4001, dtype=torch.float64)
    near = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    return torch.cat([even, near]).clamp(lower, upper)


def gaps(row, lower, upper):
    """How far the lines stay below and above the activation, at many points."""
    lines, z = enclosing_lines(row, lower, upper), inside(lower, upper)
    value = row.value(z)
    below = value - (lines.low_slope * z + lines.low_offset)
    above = (lines.high_slope * z + lines.high_offset) - value
    return below, above


@pytest.mark.parametrize("name", [*ROWS, "identity"])
@given(centre=CENTRES, width=WIDTHS)
def test_lines_enclose_the_activation(name, centre, width):
    row = ROWS.get(name, IDENTITY)
    lower, upper = interval(centre, width)
    slack = 2.0**-50 * (1 + 3 * abs(centre) + 3 * width)  # the rounding of this comparison
    for gap in gaps(row, lower, upper):
        assert gap.min() >= -slack
    lines = enclosing_lines(row, lower, upper)
    assert max(lines.low_slope.abs(), lines.high_slope.abs()) <= row.max_slope


@pytest.mark.parametrize("name", ROWS)
def test_lines_enclose_the_activation_in_high_precision(name):
    row, exact = ROWS[name], EXACT[name]
    generator = torch.Generator().manual_seed(0)
    for width in (0.0, 1e-14, 1e-9, 1e-2, 3.0, 40.0):
        for _ in range(6):
            centre = 12 * torch.rand(1, generator=generator, dtype=torch.float64).item() - 6
            lower, upper = interval(centre, width)
            lines = enclosing_lines(row, lower, upper)
            low, high, a, b, c, d = map(
                float, (lower, upper, lines.low_slope, lines.low_offset,
                        lines.high_slope, lines.high_offset)
            )  # fmt: skip
            with mpmath.workdps(50):
                for share in (0, mpmath.mpf(1) / 7, mpmath.mpf(1) / 2, mpmath.mpf(4) / 5, 1):
                    z = low + share * (mpmath.mpf(high) - low)
                    assert a * z + b <= exact(z) <= c * z + d


@pytest.mark.parametrize("name", ROWS)
@given(centre=st.floats(-5, 5), width=st.floats(1e-3, 10))
def test_lines_touch_the_activation(name, centre, width):
    row = ROWS[name]
    lower, upper = interval(centre, width)
    below, above = gaps(row, lower, upper)
    room = (below + above).max()
    # A sixteenth of the interval holds 1/256 of the room a constant bend makes.
    assert max(below.min(), above.min()) <= 0.02 * room + 1e-12


@given(centre=st.floats(-5, 5), width=st.floats(1e-3, 10))
def test_convex_softplus_gets_its_tangent_and_its_secant(centre, width):
    row = ROWS["softplus"]
    lower, upper = interval(centre, width)
    lines, middle = enclosing_lines(row, lower, upper), lower + (upper - lower) / 2
    secant = (row.value(upper) - row.value(lower)) / (upper - lower)
    room = row.value(lower) + secant * (middle - lower) - row.value(middle)
    assert lines.high_slope.item() == pytest.approx(secant.item(), abs=1e-11)
    assert lines.low_slope.item() == pytest.approx(row.slope(middle).item(), abs=1e-11)
    at_lower = lines.high_slope * lower + lines.high_offset
    assert at_lower.item() == pytest.approx(row.value(lower).item(), abs=1e-11)
    at_middle = lines.low_slope * middle + lines.low_offset
    assert row.value(middle) - at_middle <= 0.003 * room + 1e-11


@given(random_networks(activations=EVERY), st.sampled_from([0.01, 0.1, 0.5, 2.0]))
def test_no_point_of_a_ball_is_below_a_margin(case, radius):
    model, generator = case
    network = read_network(model)
    x = torch.randn(3, network.inputs, generator=generator, dtype=torch.float64)
    y = network.logits(x).argmax(1)
    item, label, target = every_pair(network.classes, y)
    margin = crown_margin(Prover.of(network), x[item], label, target, radius)
    attacked = crc.attack(model, x, y, radius=radius, restarts=3)
    assert (margin.reshape(3, -1).amin(1) <= attacked.margin).all()
    for _ in range(30):
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        point = x + radius * (1 - 1e-14) * torch.nn.functional.normalize(step, dim=1)
        value, _ = network.margin_and_gradient(point[item], label, target)
        assert (margin <= value).all()


@given(random_networks(max_inputs=4, max_width=8, activations=EVERY))
@settings(max_examples=25)
def test_no_attack_beats_a_radius(case):
    model, generator = case
    network, prover = read_network(model), Prover.of(read_network(model))
    x = torch.randn(3, network.inputs, generator=generator, dtype=torch.float64)
    y = network.logits(x).argmax(1)
    item, label, target = every_pair(network.classes, y)
    radius = crown_radius(prover, x[item], label, target)
    attacked = crc.attack(model, x, y, restarts=3)
    assert (attacked.distance >= radius.reshape(3, -1).amin(1)).all()
    proved = (radius > 0) & radius.isfinite()
    again = crown_margin(prover, x[item], label, target, radius.nan_to_num(posinf=1.0))
    assert (again[proved] > 0).all()


def test_margins_of_trained_digits_fall_with_the_radius(digits, digits_model):
    # No theorem: the lines change with the ball, and a few saturated networks break the rule.
    item, label, target = every_pair(10, digits.test.y[:10])
    x, prover = digits.test.x[:10].flatten(1).double()[item], Prover.of(read_network(digits_model))
    radii = (0, 0.01, 0.1, 0.2, 0.5, 1.0, 2.0, 8.0)
    margins = torch.stack([crown_margin(prover, x, label, target, r) for r in radii])
    assert (margins.diff(dim=0) < 0).all()


def test_linear_networks_get_their_exact_margin_and_distance():
    first, last = crc.mlp([6, 5], seed=1).double()[1], crc.mlp([5, 4], seed=0).double()[1]
    for model in (crc.mlp([6, 4], seed=0).double(), torch.nn.Sequential(first, last)):
        x = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        network = read_network(model)
        item, label, target = every_pair(4, network.logits(x).argmax(1))
        f, g = network.margin_and_gradient(x[item], label, target)
        prover = Prover.of(network)
        margin = crown_margin(prover, x[item], label, target, 0.3)
        assert (margin <= f - 0.3 * g.norm(dim=1)).all()
        torch.testing.assert_close(margin, f - 0.3 * g.norm(dim=1), rtol=0, atol=1e-11)
        radius = crown_radius(prover, x[item], label, target)
        torch.testing.assert_close(radius, f / g.norm(dim=1), rtol=2e-4, atol=0)
        assert (radius <= f / g.norm(dim=1)).all()


def one_or_two_units(*weights):
    """softplus(w x) summed over the weights, as the margin of class 0 over class 1."""
    model = crc.mlp([1, len(weights), 2], "softplus").double()
    values = [[w] for w in weights], 0.0, [[1.0] * len(weights), [0.0] * len(weights)], 0.0
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value, dtype=torch.float64))
    return Prover.of(read_network(model))


def test_units_worked_out_by_hand():
    x, pair = torch.tensor([[0.4]], dtype=torch.float64), (torch.tensor([0]), torch.tensor([1]))
    one = crown_margin(one_or_two_units(3.0), x, *pair, 0.2).item()
    assert one == pytest.approx(math.log1p(math.exp(0.6)), abs=1e-7)  # its value at the left end
    # z and -z at 1.2, moving by 0.6 against each other: the tangents at the middle.
    two = crown_margin(one_or_two_units(3.0, -3.0), x, *pair, 0.2).item()
    slope = 1 / (1 + math.exp(-1.2)) - 1 / (1 + math.exp(1.2))
    tangents = math.log1p(math.exp(1.2)) + math.log1p(math.exp(-1.2)) - 0.6 * slope
    assert two == pytest.approx(tangents, abs=1e-3) and two <= tangents


@given(random_networks(activations=EVERY))
def test_a_ball_of_no_width_holds_the_clean_margin(case):
    model, generator = case
    network = read_network(model)
    x = torch.randn(3, network.inputs, generator=generator, dtype=torch.float64)
    label, target = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    clean, _ = network.margin_and_gradient(x, label, target)
    margin = crown_margin(Prover.of(network), x, label, target, 0.0)
    assert (margin <= clean).all()
    jump = Prover.of(network).rounding.deviation(network.margin_weights(label, target))
    torch.testing.assert_close(margin + jump, clean, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("activation", ["softplus", "tanh", "gelu"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("kind", [Balls.of, partial(BentBalls.of, guess=good_parabolas)])
def test_margins_hold_in_high_precision(kind, activation, scale):
    model = crc.mlp([4, 6, 5, 2], activation, seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    network = read_network(model)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pair = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    for radius in (0.0, 1e-13, 1e-10):
        margin = crown_margin(Prover.of(network), x, *pair, radius, kind)
        assert margin.isfinite().all()
        with mpmath.workdps(60):
            for point, bound in zip(x, margin.tolist(), strict=True):
                assert bound <= evaluate_exactly(network, point, 0, 1)[0]


def test_order_and_company_do_not_matter(monkeypatch):
    model = crc.mlp([6, 12, 10, 8, 4], "tanh", seed=3).double()
    network = read_network(model)
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    item, label, target = every_pair(4, network.logits(x).argmax(1))
    prover = Prover.of(network)
    margin = crown_margin(prover, x[item], label, target, 0.4)
    radius = crown_radius(prover, x[item], label, target)
    order = torch.randperm(len(item), generator=torch.Generator().manual_seed(0))
    for values in (100, 3000):  # blocks of rows, chunks of inputs
        monkeypatch.setattr(module, "_CHUNK_VALUES", values)
        shuffled = crown_margin(prover, x[item][order], label[order], target[order], 0.4)
        torch.testing.assert_close(shuffled, margin[order], rtol=1e-9, atol=1e-12)
        shuffled = crown_radius(prover, x[item][order], label[order], target[order])
        torch.testing.assert_close(shuffled, radius[order], rtol=2e-4, atol=0)
    radii = torch.linspace(0, 1, len(item), dtype=torch.float64)
    mixed = crown_margin(prover, x[item], label, target, radii)
    for i in (0, 5, len(item) - 1):
        lone = crown_margin(
            prover, x[item][i : i + 1], label[i : i + 1], target[i : i + 1], radii[i].item()
        )
        torch.testing.assert_close(lone[0], mixed[i], rtol=1e-9, atol=1e-12)


def test_an_overflowing_input_leaves_the_others_alone():
    network = read_network(crc.mlp([3, 8, 3], seed=0).double())
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    item, label, target = every_pair(3, network.logits(x).argmax(1))
    prover = Prover.of(network)
    alone = crown_radius(prover, x[item], label, target)
    x[1] = 1e308
    together = crown_radius(prover, x[item], label, target)
    assert (together[item == 1] == 0).all()
    assert (crown_margin(prover, x[item], label, target, 0.1)[item == 1] == -torch.inf).all()
    torch.testing.assert_close(together[item != 1], alone[item != 1], rtol=2e-4, atol=0)


def test_radii_where_there_is_no_adversary_and_where_there_is_nothing_to_prove():
    bounded = crc.mlp([2, 4, 2], "tanh", seed=0).double()
    with torch.no_grad():
        bounded[3].bias.copy_(torch.tensor([100.0, 0.0]))
    x, prover = torch.ones(2, 2).double(), Prover.of(read_network(bounded))
    label, target = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert crown_radius(prover, x, label, target).tolist() == [math.inf, 0.0]


def test_a_limit_stops_the_search_and_only_that(digits, digits_model):
    x, y = digits.test.x[:10].flatten(1).double(), digits.test.y[:10]
    item, label, target = every_pair(10, y)
    prover = Prover.of(read_network(digits_model))
    free = crown_radius(prover, x[item], label, target)
    limit = torch.full_like(free, free[free > 0].median().item())
    limited = crown_radius(prover, x[item], label, target, limit)
    beyond = free > limit * (1 + 1e-3)
    assert (limited[beyond] > limit[beyond]).all()
    short = free < limit * (1 - 1e-3)
    torch.testing.assert_close(limited[short], free[short], rtol=2e-4, atol=0)


def test_trained_digits_are_mostly_certified_and_verdicts_are_those_of_radii(
    digits, digits_model, monkeypatch
):
    x, y = digits.test.x[:40], digits.test.y[:40]
    radius = crc.certify(digits_model, x, y, method="crown").radius
    attacked = crc.attack(digits_model, x, y).distance
    assert (radius <= attacked).all()
    assert radius.mean() > 0.85 * attacked.mean()
    ball = radius[radius > 0].median().item()
    robust = crc.verify(digits_model, x, y, ball, method="crown").robust
    decided = (radius - ball).abs() > 1e-3 * ball  # where the search for a radius stops
    assert torch.equal(robust[decided], (radius >= ball)[decided])
    assert robust.any() and not robust.all()
    assert not crc.attack(digits_model, x[robust], y[robust], radius=ball).success.any()
    # Nor do verdicts depend on the company of an input.
    monkeypatch.setattr(sys.modules[crc.verify.__module__], "_CHUNK_VALUES", 7 * 64 * 10)
    assert torch.equal(crc.verify(digits_model, x, y, ball, method="crown").robust, robust)
    wrong = (y + 1) % 10
    missed = digits_model(x).argmax(1) != wrong
    assert not crc.verify(digits_model, x, wrong, 1e-3, method="crown").robust[missed].any()
