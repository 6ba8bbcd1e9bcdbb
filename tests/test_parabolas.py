"""Parabolas below units: proved offsets, margins no point goes below, units that cancel."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import EVERY, ROWS, every_pair, examples, random_networks
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.certificate.question import Radius
from crcbook.networks import read_network
from crcbook.proof import parabolas as module
from crcbook.proof.lines import Search, crown_margin, crown_radius
from crcbook.proof.parabolas import BentBalls, UnitParabolas, Units
from crcbook.proof.prover import Entries, Prover
from crcbook.stages.parabola_search import _Functions, good_parabolas
from crcbook.stages.parabolas import Parabolas

BENT = partial(BentBalls.of, guess=good_parabolas)

NUMBERS = st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1e-12, -1e3, 1e3]))


def one_unit(activation, centre, radius):
    """A unit z = x in a ball."""
    model = crc.mlp([1, 1, 2], "softplus", seed=0).double()
    model[2] = activation
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.zero_()
    prover = Prover.of(read_network(model))
    x, rho = torch.tensor([[centre]]).double(), torch.tensor([radius]).double()
    return Units.of(BentBalls.of(prover, x, rho), 0)


@pytest.mark.parametrize("activation", [torch.nn.Softplus(), torch.nn.Tanh(), torch.nn.GELU()])
@given(
    st.floats(-6, 6),
    st.sampled_from([1e-9, 1e-3, 0.5, 3.0, 20.0]),
    NUMBERS,
    NUMBERS,
    NUMBERS,
)
def test_an_offset_is_below_its_unit(activation, centre, radius, weight, bend, slope):
    units = one_unit(activation, centre, radius)
    own = torch.tensor([[weight]], dtype=torch.float64)
    parabola = UnitParabolas(own.new_tensor([[bend]]), own.new_tensor([[slope]]), own.new_zeros(1))
    z = torch.linspace(float(units.low), float(units.high), 4001, dtype=torch.float64)
    away = z - units.middle
    terms = weight * units.row.value(z), bend / 2 * away.square(), slope * away
    gap = terms[0] + terms[1] - terms[2] - parabola.offsets(units, own)
    assert gap.min() >= -(2.0**-48) * sum(term.abs().max() for term in terms)


@pytest.mark.parametrize("name", ROWS)
def test_the_chosen_parabolas_touch(name):
    generator = torch.Generator().manual_seed(0)
    model = crc.mlp([3, 8, 2], "softplus", seed=1).double()
    prover = Prover.of(read_network(model))
    layer = prover.network.layers[0]
    x = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    units = Units.of(BentBalls.of(prover, x, torch.tensor([0.7]).double()), 0)
    assert len(units.moving) == len(layer.bias)
    units = type(units)(ROWS[name], *list(vars(units).values())[1:])
    own = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    u = torch.randn(5, 3, generator=generator, dtype=torch.float64) * 0.3
    z = (units.middle + u @ units.factor.mT).clamp(units.low, units.high)
    bend, away = _Functions(units, own[:, 0], own)._secants(z), z - units.middle
    tilt = own * units.row.slope(z)
    parabolas = UnitParabolas(bend, tilt + bend * away, own.new_zeros(5))
    at_point = own * units.row.value(z) - tilt * away - bend / 2 * away.square()
    lost = at_point - parabolas.offsets(units, own)
    wide = (units.high - units.low).square() * own.abs() * units.row.max_bend
    assert (lost >= -1e-12 * (1 + wide)).all() and (lost <= 1e-2 * wide).all()


def any_parabolas(units, constant, own, functions, goal):
    """A guess that knows nothing."""
    generator = torch.Generator().manual_seed(len(functions))
    drawn = torch.randn(3, *own.shape, generator=generator, dtype=torch.float64)
    size = own.abs().amax() * units.factor.norm().square() * len(own.T)
    return UnitParabolas(own.abs() * drawn[0], own.abs() * drawn[1], size * drawn[2].abs().amax(1))


@pytest.mark.parametrize("guess", [good_parabolas, any_parabolas])
@given(
    random_networks(max_inputs=2, max_width=6, activations=EVERY), st.sampled_from([0.1, 0.5, 2.0])
)
@examples(2 / 3)
def test_no_point_of_a_disk_goes_below_a_margin(guess, case, radius):
    model, generator = case
    network = read_network(model)
    x = torch.randn(2, network.inputs, generator=generator, dtype=torch.float64)
    item, label, target = every_pair(network.classes, network.logits(x).argmax(1))
    kind = partial(BentBalls.of, guess=guess)
    margin = crown_margin(Prover.of(network), x[item], label, target, radius, kind)
    assert not margin.isnan().any()
    way = torch.randn(4000, network.inputs, generator=generator, dtype=torch.float64)
    way = torch.nn.functional.normalize(way, dim=1)
    way = way * radius * torch.rand(4000, 1, generator=generator, dtype=torch.float64).sqrt()
    for i, (place, y, t) in enumerate(zip(item, label, target, strict=True)):
        logits = network.logits(x[place] + way)
        assert margin[i] <= (logits[:, y] - logits[:, t]).min() + 1e-9 * logits.abs().max()


def test_units_that_cancel_are_seen_to_cancel():
    model = crc.mlp([1, 2, 2], "softplus").double()
    values = [[3.0], [3.0]], 0.0, [[1.0, -1.0], [0.0, 0.0]], [0.5, 0.0]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value, dtype=torch.float64))
    prover, x = Prover.of(read_network(model)), torch.tensor([[0.1]]).double()
    pair = torch.tensor([0]), torch.tensor([1])
    lines, bent = (crown_margin(prover, x, *pair, 1.0, kind) for kind in (None, BENT))
    assert lines < 0  # the margin is 0.5 everywhere
    assert 0 < bent <= 0.5


def test_two_layers_gain_over_lines_and_stay_below_attacks(digits, digits_model):
    x, y = digits.test.x[:20], digits.test.y[:20]
    with torch.no_grad():
        for parameter in digits_model.parameters():
            parameter.mul_(1.5)  # bent enough that lines leave a gap
    try:
        lines = crc.certify(digits_model, x, y, method="crown").radius
        bent = crc.certify(digits_model, x, y, method="parabolas").radius
        best = crc.certify(digits_model, x, y)
        attacked = crc.attack(digits_model, x, y).distance
    finally:
        with torch.no_grad():
            for parameter in digits_model.parameters():
                parameter.div_(1.5)
    assert (bent <= attacked).all() and (best.radius <= attacked).all()
    assert (bent >= lines * (1 - 1e-3)).all() and bent.sum() > 1.05 * lines.sum()


@pytest.mark.parametrize(("widths", "options"), [([12], {}), ([10, 8], {"curvature": "local"})])
def test_the_default_asks_for_parabolas_where_much_is_open(widths, options):
    model = crc.mlp([6, *widths, 4], "tanh", seed=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    x = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lines, bent = (crc.certify(model, x, method=name).radius for name in ("crown", "parabolas"))
    best = crc.certify(model, x, **options)
    near = best.radius >= 0.9 * best.distance
    assert ((best.radius >= 0.95 * bent) | near).all() and (bent > 1.1 * lines).any()
    assert "parabolas" in best.method
    radius = 0.99 * best.radius
    assert crc.verify(model, x, radius=radius, **options).robust[best.radius > 0].all()


def test_one_ascent_proves_what_many_balls_do():
    prover = Prover.of(read_network(crc.mlp([6, 12, 4], "tanh", seed=3).double()))
    with torch.no_grad():
        x = 2 * torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    item, label, target = every_pair(4, prover.network.logits(x).argmax(1))
    entries = Entries.of(prover, x[item], label, target)
    entries = replace(entries, image=item, goal=torch.full_like(x[item, 0], torch.inf))
    one, none = Parabolas(prover)(Radius(), entries)
    assert none is None
    many = crown_radius(prover, x[item], label, target, search=Search(BENT, True, 1e-3))
    smallest = many.reshape(5, -1).amin(1)
    assert (one.reshape(5, -1).amin(1) >= 0.95 * smallest).all()
    lines = crown_radius(prover, x[item], label, target, search=Search(smallest=True))
    assert (one >= lines * (1 - 1e-3)).all()
    # What is known already is where it begins, and what it never falls below.
    again, _ = Parabolas(prover)(Radius(), replace(entries, bound=0.9 * one))
    assert (again >= 0.9 * one).all()
    assert (again.reshape(5, -1).amin(1) >= 0.95 * smallest).all()


def test_a_search_goes_on_from_what_is_known(monkeypatch):
    model = crc.mlp([6, 12, 10, 4], "tanh", seed=3).double()
    prover = Prover.of(read_network(model))
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    item, label, target = every_pair(4, prover.network.logits(x).argmax(1))
    pairs = prover, x[item], label, target
    free = crown_radius(*pairs, search=Search(BENT, True, 1e-3))
    after = crown_radius(*pairs, search=Search(BENT, True, 1e-3, 0.7 * free))
    smallest = free.reshape(5, -1).amin(1)
    torch.testing.assert_close(after.reshape(5, -1).amin(1), smallest, rtol=2e-2, atol=0)
    # Where matrices would be too large lines have to do.
    monkeypatch.setattr(module, "LARGEST", 1)
    bent, plain = (crown_margin(*pairs, 0.1, kind) for kind in (BENT, None))
    assert torch.equal(bent, plain)


def test_an_overflowing_input_leaves_the_others_alone():
    prover = Prover.of(read_network(crc.mlp([3, 8, 6, 3], seed=0).double()))
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    item, label, target = every_pair(3, prover.network.logits(x).argmax(1))
    search = Search(BENT, True, 1e-2)
    alone = crown_radius(prover, x[item], label, target, search=search)
    for large in (1e150, 1e308):
        x[1] = large
        together = crown_radius(prover, x[item], label, target, search=search)
        margin = crown_margin(prover, x[item], label, target, 0.1, BENT)
        clean, _ = prover.network.margin_and_gradient(x[item], label, target)
        assert not margin.isnan().any() and not (margin > clean.nan_to_num(-torch.inf)).any()
        torch.testing.assert_close(together[item != 1], alone[item != 1], rtol=2e-2, atol=0)
    assert (margin[item == 1] == -torch.inf).all() and (together[item == 1] == 0).all()


def test_a_network_that_hardly_moves_has_no_parabolas_to_look_for():
    model = crc.mlp([3, 4, 2], "tanh", seed=0).double()
    with torch.no_grad():
        model[1].weight.zero_()
    prover, x = Prover.of(read_network(model)), torch.zeros(1, 3).double()
    label = prover.network.logits(x).argmax(1)
    bent, lines = (crown_margin(prover, x, label, 1 - label, 0.5, kind) for kind in (BENT, None))
    assert bent == lines and bent.isfinite()
