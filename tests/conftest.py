"""What several test files share: networks, exact references, trained digits, a browser."""

import os

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

import crcbook as crc
from crcbook import hessian
from crcbook.activations import softplus

# The same examples every time, so that a change is what makes a test fail; `make check` takes few
# of them, and `make explore` new ones at every run.
settings.register_profile("test", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("check", deadline=None, max_examples=5, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=200, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


def examples(share):
    """Settings of a test that is dear: a share of the profile's examples, at least two."""
    return settings(max_examples=max(2, round(share * settings().max_examples)))


SMOOTH = sorted(crc.ACTIVATIONS)
ROWS = {**crc.ACTIVATIONS, "softplus(4)": softplus(4.0), "softplus(0.1)": softplus(0.1)}


class Halves(nn.Module):
    """tanh of the first half of the units; the others go on as they are."""

    def forward(self, z):
        half = (z.shape[-1] + 1) // 2
        rest = [z[..., half:]] if half < z.shape[-1] else []
        return torch.cat([torch.tanh(z[..., :half]), *rest], dim=-1)


# Those that crcbook.mlp has no name for.
OTHERS = {
    "halves": Halves(),
    "gelu-tanh": nn.GELU("tanh"),
    "mish": nn.Mish(),
    "elu": nn.ELU(),
    "celu(0.7)": nn.CELU(0.7),
    "logsigmoid": nn.LogSigmoid(),
    "softsign": nn.Softsign(),
    "softplus(4)": nn.Softplus(4.0),
}
EVERY = [*SMOOTH, *OTHERS]
EXACT = {
    "softplus": lambda z: mpmath.log1p(mpmath.exp(z)),
    "softplus(4)": lambda z: mpmath.log1p(mpmath.exp(4 * z)) / 4,
    "softplus(0.1)": lambda z: mpmath.log1p(mpmath.exp(z * mpmath.mpf(0.1))) / mpmath.mpf(0.1),
    "sigmoid": lambda z: 1 / (1 + mpmath.exp(-z)),
    "tanh": mpmath.tanh,
    "silu": lambda z: z / (1 + mpmath.exp(-z)),
    "gelu": lambda z: z * mpmath.ncdf(z),
    "arctan": mpmath.atan,
}


def network_of(sizes, activation, seed):
    """A network with a named activation, also where crcbook.mlp has no name for it."""
    other = OTHERS.get(activation)
    model = crc.mlp(sizes, "softplus" if other else activation, seed=seed)
    parts = (other if other and isinstance(part, nn.Softplus) else part for part in model)
    return nn.Sequential(*parts)


@st.composite
def random_networks(draw, max_inputs=6, max_width=12, max_classes=4, activations=SMOOTH):
    """A network of 2 to 5 layers whose weights are scaled by 1/4 to 4, and its generator."""
    seed = draw(st.integers(0, 2**31 - 1))
    hidden = draw(st.lists(st.integers(1, max_width), min_size=1, max_size=4))
    sizes = [draw(st.integers(1, max_inputs)), *hidden, draw(st.integers(2, max_classes))]
    model = network_of(sizes, draw(st.sampled_from(activations)), seed)
    scale = draw(st.sampled_from([0.25, 1.0, 4.0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.double(), torch.Generator().manual_seed(seed)


def margin_hessian(model, x, label, target):
    """The dense float64 Hessian of ``z_label - z_target`` at one point, by autograd."""

    def margin(point):
        logits = model(point[None])[0]
        return logits[label] - logits[target]

    return torch.autograd.functional.hessian(margin, x.double())


def every_pair(classes, y):
    """Each item's place, label and target, for all the other classes."""
    item = torch.arange(len(y)).repeat_interleave(classes - 1)
    target = torch.arange(classes).expand(len(y), -1)
    return item, y[item], target[target != y[:, None]]


def thin_model(sizes, activation, scale, seed, rest=0.05):
    """A network whose first layer has few directions that count, and its generator."""
    model = network_of(sizes, activation, seed).double()
    generator = torch.Generator().manual_seed(seed)
    tall, wide = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                  for shape in ((sizes[1], 2), (2, sizes[0])))  # fmt: skip
    with torch.no_grad():
        model[1].weight.mul_(rest).add_(tall @ wide / sizes[0] ** 0.5).mul_(scale)
    return model, generator


def bent_lines(count):
    """Sharply bent networks of one input, with inputs around which a grid sees whole balls."""
    for seed in range(count):
        hidden, scale = 2 + seed % 3, (4.0, 8.0, 16.0)[seed // 3 % 3]
        model = network_of([1, *[3] * hidden, 2], EVERY[seed % len(EVERY)], seed).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
            model[1].weight.mul_(2 / scale)
        generator = torch.Generator().manual_seed(seed)
        yield model, 2 * torch.randn(1, generator=generator, dtype=torch.float64)


def worst_on_a_line(model, x, radius):
    """The least margin of class 0 over class 1 in a ball, and the most that it bends down there."""
    points = x + radius * torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None]
    logits = model(points).detach()
    return (logits[:, 0] - logits[:, 1]).min(), -hessian.margin_hessian(model, points, 0, 1).min()


def evaluate_exactly(network, x, label, target):
    """The margin and its gradient at one point, in mpmath's precision."""
    value = EXACT[network.layers[0].activation.name]
    a, slopes = mpmath.matrix(x.tolist()), []
    for layer in network.layers[:-1]:
        z = mpmath.matrix(layer.weight.tolist()) * a + mpmath.matrix(layer.bias.tolist())
        slopes.append([mpmath.diff(value, entry) for entry in z])
        a = mpmath.matrix([value(entry) for entry in z])
    last = network.layers[-1]
    rows, bias = mpmath.matrix(last.weight.tolist()), last.bias.tolist()
    w = (rows[label, :] - rows[target, :]).T
    margin = (w.T * a)[0] + mpmath.mpf(bias[label]) - mpmath.mpf(bias[target])
    for layer, slope_row in zip(network.layers[-2::-1], reversed(slopes), strict=True):
        scaled = mpmath.matrix([g * s for g, s in zip(w, slope_row, strict=True)])
        w = mpmath.matrix(layer.weight.tolist()).T * scaled
    return margin, w


@pytest.fixture(scope="session")
def digits():
    """The bundled digits."""
    return crc.load("digits")


@pytest.fixture(scope="session")
def digits_model(digits):
    """A small network trained for curvature on the bundled digits."""
    model = crc.mlp([64, 48, 10], seed=0)
    recipe = crc.Recipe(radius=0.5, gamma=0.02, epochs=12, batch_size=64, attack_steps=4)
    crc.train(model, digits.train, recipe)
    return model


@pytest.fixture
def line_model():
    """A network whose boundary is the line x1 = 1/4."""
    model = crc.mlp([2, 2])
    model[1].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    model[1].bias.data = torch.tensor([-0.25, 0.25])
    return model


@pytest.fixture
def unit_model():
    """A margin of curvature |m| = 1 in one direction, 1.3 at the origin: 2 - softplus(2 x1)."""
    model = crc.mlp([2, 1, 2]).double()
    model[1].weight.data = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    model[1].bias.data.zero_()
    model[3].weight.data = torch.tensor([[-1.0], [0.0]], dtype=torch.float64)
    model[3].bias.data = torch.tensor([2.0, 0.0], dtype=torch.float64)
    return model


@pytest.fixture(scope="session")
def bent_model(digits):
    """A deep one, trained for nothing: local curvature certifies what global one does not."""
    model = crc.mlp([64, 24, 24, 24, 10], seed=0)
    recipe = crc.Recipe("standard", epochs=10, batch_size=64, learning_rate=5e-3)
    crc.train(model, digits.train, recipe)
    return model


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    import browser as book

    if book.CHROMIUM is None and not os.environ.get("CRCBOOK_REQUIRE_BROWSER"):
        pytest.skip("no Chromium found; on Debian: apt install chromium")
    # Its event loop must end before the chapters are run: a module at a time.
    with book.launch() as browser:
        yield browser


def write_onnx(path):
    """A network of 4 inputs, 5 units of tanh and 3 classes."""
    onnx = pytest.importorskip("onnx", reason="ONNX files need the onnx package")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    generator = np.random.default_rng(0)
    constants = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in {"v": (4, 5), "b": (5,), "w": (5, 3)}.items()
    }
    nodes = [
        helper.make_node("Gemm", ["x", "v", "b"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", real, ["batch", 4])],
        [helper.make_tensor_value_info("z", real, ["batch", 3])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, path)
