"""Networks with branches: what is read is the model, and no adversary is inside of a bound."""

import copy
import itertools

import pytest
import torch
from conftest import EVERY, OTHERS, examples, margin_hessian
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import crcbook as crc
from crcbook.certificate.table import METHODS
from crcbook.networks import read_network
from crcbook.networks.mixed import Mixed
from crcbook.networks.modules import activation_module

JOINS = {
    "sum": lambda x, first, second: x + second(first(x)),
    "sum of several bends": lambda x, first, second: second(first(x)) + second(first(second(x))),
    "difference": lambda x, first, second: first(x) - second(x),
    "beside": lambda x, first, second: torch.cat([first(x), x, second(first(x))], dim=1),
    "nested": lambda x, first, second: x + second(x + first(x)),
}


class Block(nn.Module):
    """Two layers of as many units as inputs, and a way to join them."""

    def __init__(self, width, join, activations):
        super().__init__()
        self.join = JOINS[join]
        self.first, self.second = (
            nn.Sequential(nn.Linear(width, width), copy.deepcopy(OTHERS[name]))
            if name in OTHERS
            else nn.Sequential(nn.Linear(width, width), activation_module(name))
            for name in activations
        )

    def forward(self, x):
        return self.join(x, self.first, self.second)


@st.composite
def branched(draw):
    """A model of one block or two, and its generator."""
    seed = draw(st.integers(0, 2**31 - 1))
    torch.manual_seed(seed)
    inputs, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    parts = [nn.Linear(inputs, width)]
    for _ in range(draw(st.integers(1, 2))):
        names = draw(st.lists(st.sampled_from(EVERY), min_size=2, max_size=2))
        parts.append(Block(width, draw(st.sampled_from(sorted(JOINS))), names))
        width = parts[-1](torch.zeros(1, width)).shape[1]
    model = nn.Sequential(*parts, nn.Linear(width, draw(st.integers(2, 3)))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(draw(st.sampled_from([0.5, 1.0, 3.0])))
    return model.eval(), torch.Generator().manual_seed(seed)


@given(branched())
def test_a_network_with_branches_is_read_as_what_it_computes(case):
    model, generator = case
    x = torch.randn(5, model[0].in_features, generator=generator).double()
    network = read_network(model, at=x)
    with torch.no_grad():
        torch.testing.assert_close(network.logits(x), model(x), rtol=1e-9, atol=1e-9)
    for layer in network.layers:
        if isinstance(layer.activation, Mixed):  # groups are those of the table, none in another
            assert sum(count for _, count in layer.activation.parts) == len(layer.bias)
            assert not any(isinstance(row, Mixed) for row, _ in layer.activation.parts)


@examples(0.4)
@given(branched(), st.sampled_from([*METHODS, "best", "local"]))
def test_no_adversary_of_one_is_closer_than_certified(case, method):
    model, generator = case
    x = torch.randn(3, model[0].in_features, generator=generator).double()
    options = {"curvature": "local"} if method == "local" else {"method": method}
    certificate = crc.certify(model, x, **options)
    distance = crc.attack(model, x).distance
    assert not (certificate.radius > distance * (1 + 1e-9) + 1e-12).any()
    away = torch.randn(200, *x.shape, generator=generator).double()
    away = away / away.norm(dim=2, keepdim=True) * certificate.radius.clamp(max=1e3)[:, None]
    with torch.no_grad():
        moved = model((x + away * (1 - 1e-9)).flatten(0, 1)).reshape(200, 3, -1)
        label = model(x).argmax(1).expand(200, 3)[:, :, None]
    own = moved.gather(2, label)[:, :, 0]
    others = moved.scatter(2, label, -torch.inf).amax(2)
    assert not (own < others - 1e-9 * (1 + own.abs())).any()


@examples(0.4)
@given(branched())
def test_its_curvature_bounds_hold(case):
    model, generator = case
    x = torch.randn(1, model[0].in_features, generator=generator).double()
    lowest, highest = crc.curvature_bounds(model, 0, 1)
    hessian = margin_hessian(model, x[0], 0, 1)
    least, most = torch.linalg.eigvalsh(hessian)[[0, -1]]
    scale = 1e-9 * (1 + float(most.abs()) + float(least.abs()))
    assert float(lowest) <= float(least) + scale and float(most) <= float(highest) + scale


@pytest.mark.parametrize("units", [[0], [1, 2], [0, 3, 4], [0, 1, 2, 3, 4]])
def test_some_units_of_a_mixed_layer_have_their_own_activations(units):
    model = nn.Sequential(nn.Linear(2, 2), Block(2, "beside", ["tanh", "sigmoid"]), nn.Linear(6, 2))
    network = read_network(model.eval())
    row = next(one.activation for one in network.layers if isinstance(one.activation, Mixed))
    count = sum(count for _, count in row.parts)
    chosen = torch.tensor([unit for unit in units if unit < count])
    z = torch.linspace(-3, 3, count).double()
    own = row.take(chosen)
    for function in ("value", "slope", "bend"):
        whole, part = getattr(row, function)(z), getattr(own, function)(z[chosen])
        assert torch.equal(whole[chosen], part)
    for interval in ("value_interval", "slope_interval", "bend_interval"):
        whole = getattr(row, interval)(z, z + 1)
        part = getattr(own, interval)(z[chosen], z[chosen] + 1)
        assert all(torch.equal(a[chosen], b) for a, b in zip(whole, part, strict=True))


def test_networks_are_told_apart_by_the_activations_of_their_branches():
    """What is proved of one network is remembered under its key: no other may have that key."""
    keys = {}
    for (join, width), *activations in itertools.product(
        [("sum of several bends", 2), ("beside", 6)], EVERY, EVERY
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), Block(2, join, activations), nn.Linear(width, 2))
        network = read_network(model.double().eval())
        rows = [one.activation for one in network.layers]
        facts = [[(part.name, part.settings, units.stop) for part, units in row.groups()]
                 for row in rows]  # fmt: skip
        shapes = [tuple(layer.weight.shape) for layer in network.layers]
        keys.setdefault(network.key, set()).add(repr((facts, shapes)))
    assert len(keys) >= len(EVERY) ** 2
    assert all(len(described) == 1 for described in keys.values())


def test_what_is_remembered_of_one_network_is_not_believed_of_another():
    """A tanh had a sigmoid's bounds, for the ELU beside them bends more: radii were false."""
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(1)).double()

    class Two(nn.Module):
        def __init__(self, second):
            super().__init__()
            sizes = [(2, 16), (16, 2), (2, 16), (16, 2), (2, 3)]
            self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)
            self.first, self.second = nn.ELU(), second

        def forward(self, x):
            there, back, along, along_back, last = self.layers
            first = back(self.first(there(x)))
            return last(x + 0.1 * first + 3 * along_back(self.second(along(x))))

    for second in (nn.Sigmoid(), nn.Tanh()):
        for seed in range(5):  # more than are remembered as they were read
            torch.manual_seed(seed)
            model = Two(second).double().eval()
            found = crc.certify(model, x)
            assert (found.radius <= crc.attack(model, x).distance * (1 + 1e-6)).all()


def test_a_constant_beside_a_branch_may_be_on_either_side():
    torch.manual_seed(0)

    class Beside(nn.Module):
        def __init__(self, before):
            super().__init__()
            self.before, self.layer, self.last = before, nn.Linear(4, 4), nn.Linear(6, 3)

        def forward(self, x):
            parts = [torch.zeros(2).expand(len(x), 2), torch.tanh(self.layer(x))]
            parts = parts if self.before else parts[::-1]
            return self.last(torch.cat(tensors=parts, dim=1))

    first, second = Beside(True), Beside(False)
    second.load_state_dict(first.state_dict())
    x = torch.randn(5, 4)
    for model in (first, second):
        with torch.no_grad():
            expected = model(x).double()
        found = read_network(model, x).logits(x.double())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
