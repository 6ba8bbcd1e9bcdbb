"""What float32 can change of a margin, against float32 itself in many orders of summation."""

import mpmath
import pytest
import torch
from conftest import SMOOTH, evaluate_exactly
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import crcbook as crc
from crcbook.activations import ACTIVATIONS, OTHER_ACTIVATIONS, celu, softplus
from crcbook.deployed import FARTHEST, SINGLE_ROUNDING, DeployedRounding, float32_error
from crcbook.networks import read_network
from crcbook.networks.modules import module_of

ROWS = [*ACTIVATIONS.values(), *OTHER_ACTIVATIONS.values(), celu(0.7), celu(300.0), softplus(0.3)]


@st.composite
def float32_networks(draw):
    """A float32 network of 2 to 4 layers, and its generator."""
    seed = draw(st.integers(0, 2**31 - 1))
    hidden = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    model = crc.mlp(
        [draw(st.integers(1, 30)), *hidden, 3], draw(st.sampled_from(SMOOTH)), seed=seed
    )
    scale = draw(st.sampled_from([0.25, 1.0, 4.0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model, torch.Generator().manual_seed(seed)


def in_some_order(model, x, order):
    """Logits in float32, every sum taken in one of several orders."""
    for module in model[1:]:
        if not hasattr(module, "weight"):
            x = module(x)
            continue
        terms = x[:, None, :] * module.weight
        if order == "torch":
            x = module(x)
            continue
        if order == "bias first":
            x = module.bias.expand(len(x), -1)
            for j in range(terms.shape[2]):
                x = x + terms[:, :, j]
            continue
        if order == "large first":
            terms = terms.gather(2, terms.abs().argsort(dim=2, descending=True))
        total = torch.zeros_like(terms[:, :, 0])
        for j in range(terms.shape[2]):
            total = total + terms[:, :, j]
        x = total + module.bias
    return x


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_float32_activations_are_within_their_rounding(row):
    near = torch.linspace(-30, 30, 300_001)
    far = torch.logspace(-30, 4, 100_001)
    z = torch.cat([near, far, -far])
    error = (module_of(row.name, dict(row.settings))(z).double() - row.value(z.double())).abs()
    scale = torch.maximum(
        row.max_slope * z.double().abs(), row.value(torch.zeros(1).double()).abs()
    )
    assert (error <= SINGLE_ROUNDING * scale).all()


@given(float32_networks(), st.floats(0.0, 8.0))
def test_what_float32_computes_is_within_the_bound_in_any_order(case, radius):
    model, generator = case
    network = read_network(model)
    centre = torch.randn(8, network.inputs, generator=generator)
    away = torch.randn(8, network.inputs, generator=generator)
    x = centre + radius * away / away.norm(dim=1, keepdim=True)
    label, target = torch.zeros(8, dtype=torch.int64), torch.full((8,), 2)
    exact, _ = network.margin_and_gradient(x.double(), label, target)
    for middle in (centre.double(), None):
        rate, start = float32_error(network, label, target, middle)
        distance = (x.double() - (0 if middle is None else middle)).norm(dim=1)
        bound = rate * distance + start
        for order in ("torch", "bias first", "large first", "bias last"):
            logits = in_some_order(model, x, order).double()
            error = (logits[:, 0] - logits[:, 2] - exact).abs()
            assert (error <= bound + 1e-11 * (1 + exact.abs())).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_the_bound_is_within_reason(name):
    """Far below a margin, and not above a few thousand times what happens."""
    model = crc.mlp([50, 40, 30, 4], name, seed=1)
    network = read_network(model)
    x = torch.rand(200, 50, generator=torch.Generator().manual_seed(0))
    label, target = torch.zeros(200, dtype=torch.int64), torch.ones(200, dtype=torch.int64)
    rate, start = float32_error(network, label, target, x.double())
    exact, _ = network.margin_and_gradient(x.double(), label, target)
    logits = model(x).detach().double()
    error = (logits[:, 0] - logits[:, 1] - exact).abs().max()
    assert error < start.min() and start.max() < 5000 * error and start.max() < 1e-3
    assert (rate > 0).all() and rate.max() < 1e-4


def test_around_the_input_the_bound_is_the_smaller_one():
    network = read_network(crc.mlp([20, 30, 3], seed=0))
    x = torch.rand(5, 20, generator=torch.Generator().manual_seed(0)).double()
    label, target = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    rate, start = float32_error(network, label, target)
    _, around = float32_error(network, label, target, x)
    assert (around <= start + rate * x.norm(dim=1) * (1 + 1e-9)).all()


def test_an_input_that_float32_classifies_otherwise_is_refused_where_asked():
    """Between two inputs of different classes lie some that float32 decides wrongly."""
    model = crc.mlp([10, 64, 2], seed=0)
    network, one = read_network(model), torch.tensor([0])
    generator, found = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        low, high = torch.randn(2, 1, 10, generator=generator) * 3
        margins = [
            float(network.margin_and_gradient(p.double(), one, one + 1)[0]) for p in (low, high)
        ]
        if margins[0] * margins[1] > 0:
            continue
        low, high = (low, high) if margins[0] > 0 else (high, low)
        for _ in range(40):
            middle = (low + high) / 2
            margin = float(network.margin_and_gradient(middle.double(), one, one + 1)[0])
            low, high = (middle, high) if margin > 0 else (low, middle)
            logits = model(middle).detach()
            if margin > 3e-8 and logits[0, 0] <= logits[0, 1]:
                found += 1
                with mpmath.workdps(30):
                    exact, _ = evaluate_exactly(network, middle[0].double(), 0, 1)
                _, start = float32_error(network, one, one + 1, middle.double())
                assert 0 < exact <= min(float(start), 1e-5)
                for method in ("dual", "best", "lipschitz", "crown", "closed-form"):
                    real = crc.certify(model, middle, one, method=method)
                    program = crc.certify(model, middle, one, method=method, deployed="float32")
                    assert real.radius > 0 and program.radius == 0
                    asked = model, middle, one, float(real.radius) / 2
                    assert crc.verify(*asked, method=method).robust
                    assert not crc.verify(*asked, method=method, deployed="float32").robust
    assert found > 0


PLAIN = {
    **{method: {"method": method} for method in ("dual", "closed-form", "lipschitz", "crown")},
    "local": {"method": "dual", "curvature": "local"},
    "box": {"method": "dual", "box": (0.0, 1.0)},
}
# These look for parabolas too, for the program along a path of its own, which may end better.
SEARCHING = {"best": {}, "best, local": {"curvature": "local"}, "best, box": {"box": (0.0, 1.0)}}


@given(float32_networks(), st.sampled_from([*PLAIN, *SEARCHING]))
@settings(max_examples=60)
def test_no_float32_input_in_the_ball_gets_another_class_of_the_program(case, way):
    """Bisection finds where the program's class changes; no such input may be inside."""
    model, generator = case
    inputs = read_network(model).inputs
    low, high = (torch.rand(6, inputs, generator=generator) for _ in "ab")
    y = model(low).argmax(1)
    ways = (PLAIN | SEARCHING)[way]
    real, program = (
        crc.certify(model, low, y, deployed=deployed, **ways) for deployed in (None, "float32")
    )
    verdict = crc.verify(model, low, y, 0.1, deployed="float32", **ways)
    if way in PLAIN:
        digits = 1e-4 if way == "crown" else 1e-9  # a bracket of lines ends at a width
        assert (program.radius <= real.radius * (1 + digits)).all()
        assert not (verdict.robust & ~crc.verify(model, low, y, 0.1, **ways).robust).any()
    known = program.nearest.isfinite().all(1)
    high[known] = program.nearest[known].float().clamp(0, 1)  # where the nearest change is
    start = low.clone()
    for _ in range(40):
        middle = (low + high) / 2
        same = (model(middle).argmax(1) == y)[:, None]
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    changed = model(high).argmax(1) != y
    distance = (high.double() - start.double()).norm(dim=1)
    assert (distance[changed] >= program.radius[changed]).all()
    assert not (changed & verdict.robust & (distance < 0.1)).any()


def test_what_a_proof_subtracts_holds_for_every_pair_and_grows_with_the_distance():
    network = read_network(crc.mlp([20, 30, 25, 5], seed=0))
    x = torch.rand(8, 20, generator=torch.Generator().manual_seed(0)).double()
    rounding, pairs = DeployedRounding.of(network), torch.combinations(torch.arange(5))
    for label, target in pairs:
        rate, start = float32_error(network, label.expand(8), target.expand(8), x)
        assert (start <= rounding.gap_at(x)).all() and (rate <= rounding.gap[0]).all()
    assert (rounding.gap_at(x) < 3 * start).all()
    assert rounding.gap_at(0 * x[:1]) == pytest.approx(rounding.gap[1])


def test_a_radius_ends_where_the_bound_does():
    model = crc.mlp([2, 2], seed=0)
    with torch.no_grad():
        model[1].weight.fill_(1e-9)
        model[1].bias.copy_(torch.tensor([1.0, 0.0]))
        model[1].weight[0] *= -1
    x, y = torch.zeros(1, 2), torch.tensor([0])
    assert crc.certify(model, x, y).radius > 2 * FARTHEST
    assert 0.9 * FARTHEST < crc.certify(model, x, y, deployed="float32").radius <= FARTHEST
    with pytest.raises(ValueError, match="up to 1e"):
        crc.verify(model, x, y, 2 * FARTHEST, deployed="float32")


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Sigmoid()),
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    ],
)
def test_programs_of_another_kind_are_refused(model):
    x, y = torch.zeros(1, 3), torch.tensor([0])
    crc.certify(model, x, y)
    with pytest.raises(ValueError, match="Linear"):
        crc.certify(model, x, y, deployed="float32")
    with pytest.raises(ValueError, match="deployed must be one of None, float32"):
        crc.certify(model, x, y, deployed="float16")


class Written(nn.Module):
    """Two linear maps as someone's code applies them."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.apply_all = nn.Linear(12, 5), nn.Linear(5, 3), forward

    def forward(self, x):
        return self.apply_all(x, self.first, self.last)


def hooked():
    model = Written(lambda x, f, g: g(torch.tanh(f(x))))
    model.first.register_forward_hook(lambda module, inputs, output: output - 1)
    return model


def compiled():
    model = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
    model.compile()
    return model


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, f, g: g(functional.mish(f(x.view(len(x), -1)))),
        lambda x, f, g: torch.addmm(g.bias, functional.gelu(f(x.flatten(1))), g.weight.T),
        lambda x, f, g: g((z := f(x.flatten(1))) * z.sigmoid()),
        lambda x, f, g: g(torch.tanh(functional.linear(x.flatten(1), 2 * f.weight, f.bias))),
    ],
)
def test_modules_of_their_own_are_programs_too(forward):
    """The radii are those of the same layers in a Sequential, and float32 is within the bound."""
    model = Written(forward)
    x = torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    network = read_network(model, at=x)
    first, last = network.layers
    row = first.activation
    twin = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 5), module_of(row.name, dict(row.settings)), nn.Linear(5, 3)
    )
    for module, layer in zip((twin[1], twin[3]), (first, last), strict=True):
        module.weight.data, module.bias.data = layer.weight.float(), layer.bias.float()
    ours, theirs = (crc.certify(m, x, y, deployed="float32").radius for m in (model, twin))
    assert torch.equal(ours, theirs) and (ours > 0).any()
    assert (ours <= crc.certify(model, x, y).radius).all()
    label = torch.zeros(len(x), dtype=torch.int64)
    _, start = float32_error(network, label, label + 1, x.flatten(1).double())
    margins = [
        z[:, 0] - z[:, 1] for z in (model(x).double(), network.logits(x.flatten(1).double()))
    ]
    assert ((margins[0] - margins[1]).abs() <= start).all()


@pytest.mark.parametrize(
    "model",
    [
        Written(lambda x, f, g: g(torch.tanh(f((x - 0.1) / 0.3)))),
        Written(lambda x, f, g: g(torch.tanh(functional.linear(x, 3 * f.weight, f.bias)))),
        Written(lambda x, f, g: g(torch.tanh(f(x))).softmax(1)),
        hooked(),
        compiled(),
        torch.compile(Written(lambda x, f, g: g(torch.tanh(f(x))))),
        nn.DataParallel(compiled()),
    ],
)
def test_programs_that_compute_more_are_refused(model):
    x = torch.zeros(1, 12)
    with pytest.raises(ValueError, match=r"in turn.*compiled ones are not covered.*save_model"):
        crc.certify(model, x, torch.tensor([0]), deployed="float32")


def test_the_layers_that_a_model_is_read_as_are_a_program(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 5), nn.Mish(), nn.Linear(5, 3)).eval()
    crc.save_model(tmp_path / "net.safetensors", model)
    program = crc.load_model(tmp_path / "net.safetensors").float()
    x = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    assert (crc.certify(program, x, program(x).argmax(1), deployed="float32").radius > 0).all()


def test_a_device_that_shortens_float32_products_is_refused(monkeypatch):
    monkeypatch.setattr("crcbook.deployed.single_sums_hold", lambda device: False)
    with pytest.raises(ValueError, match="TF32"):
        crc.certify(crc.mlp([3, 4, 2]), torch.zeros(1, 3), torch.tensor([0]), deployed="float32")


def test_branches_are_refused_as_such():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(x + torch.tanh(self.layer(x)))

    with pytest.raises(ValueError, match="does not cover branches"):
        crc.certify(Residual(), torch.zeros(1, 4), deployed="float32")


def test_weights_that_float32_rounds_are_refused():
    model = crc.mlp([3, 4, 2], seed=0).double()
    model[1].weight.data.mul_(1 / 3)
    with pytest.raises(ValueError, match="float32"):
        float32_error(read_network(model), torch.tensor([0]), torch.tensor([1]))


def test_where_float32_could_overflow_there_is_no_bound():
    model = crc.mlp([3, 4, 2], seed=0)
    x = torch.full((1, 3), 1e35).double()
    _, start = float32_error(read_network(model), torch.tensor([0]), torch.tensor([1]), x)
    assert start.isinf().all()
