"""What is read is what the model computes, however it is written, or it is refused."""

import copy
from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from conftest import random_networks
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import v2

import crcbook as crc
from crcbook.networks import Network, read_network
from crcbook.networks import reading as module
from crcbook.proof.rounding import RoundingModel

torch.manual_seed(0)  # of the weights below
IMAGE, VECTOR = (1, 8, 8), (6,)


def small(*activations):
    """Six inputs, five hidden units, three classes."""
    return nn.Sequential(nn.Linear(6, 5), *(activations or [nn.Softplus()]), nn.Linear(5, 3))


def settled(model):
    """A model in eval mode whose BatchNorm has seen something."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return model.eval()


def changed(change):
    model = small(nn.Tanh())
    change(model[0])
    return model.eval()


class Normalised(nn.Module):
    """Images to numbers of mean 0, by buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.1307))
        self.register_buffer("deviation", torch.full((1, 1, 1, 1), 0.3081))

    def forward(self, x):
        return (x - self.mean) / self.deviation


class Convolutional(nn.Module):
    """As a stranger writes it: everything in ``forward``."""

    def __init__(self, flatten):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 8, 3, padding="same", groups=2)
        self.dropout, self.flatten = nn.Dropout(), flatten
        self.hidden, self.last = nn.Linear(32, 12), nn.Linear(12, 3)

    def forward(self, x):
        assert x.dim() == 4 and len(x) > 0
        x = 2 * (x - 0.1307) / 0.3081
        x = functional.mish(self.norm(self.first(x)))
        x = functional.avg_pool2d(torch.tanh(self.second(x)), 2)
        x = self.dropout(nn.functional.silu(self.hidden(self.flatten(x))))
        return -self.last(x) + 1


class Valued(nn.Module):
    def __init__(self, look):
        super().__init__()
        self.look, self.layer = look, nn.Linear(6, 3)

    def forward(self, x):
        return self.look(x, self.layer)


class Unrolled(nn.Module):
    """A recurrence of two steps from zeros of the input's dtype, one for each item."""

    def __init__(self):
        super().__init__()
        self.own, self.given, self.last = nn.Linear(5, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        state = torch.zeros(len(x), 5, dtype=x.dtype)
        for _ in range(2):
            state = torch.tanh(self.own(state) + self.given(x))
        return self.last(state)


class Smooth(nn.Module):
    def forward(self, x):
        return functional.softplus(x)


class Plain(nn.Linear):
    """A subclass that changes nothing."""


class Exponential(nn.Linear):
    """A linear map whose weights are computed in ``forward``."""

    def forward(self, x):
        return functional.linear(x, self.weight.exp() / 7, self.bias)


class Negated(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class Scaled(nn.Sequential):
    def forward(self, x):
        return super().forward(10 * x)


class Called(nn.Sequential):
    def __call__(self, x):
        return -super().__call__(x)


class Posing(nn.Module):
    """A module that calls itself a Linear one."""

    __class__ = nn.Linear

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x[:, :5]


def of_another_class():
    model = small()
    model[0].__class__ = Negated
    return model


def with_own_forward():
    model = small()
    model[0].forward = lambda x: 10 * x[:, :5]
    return model


def hooked():
    model = small()
    model.register_forward_pre_hook(lambda module, inputs: (10 * inputs[0],))
    model[0].register_forward_hook(lambda module, inputs, output: output - 1)
    return model


def strided():
    """Weights shared by two layers, one of them transposed, and a bias that is one number."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].weight.data = model[2].weight.data.T
    model[0].bias.data = torch.ones(1).expand(6)
    return model


def tied():
    model = strided()
    model[2].weight = model[0].weight
    return nn.Sequential(*model[:2], *model[:2], *model[2:])


def one_logit(*ending):
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), *ending)


class Branched(nn.Module):
    """Two linear branches, and what is made of them before an activation."""

    def __init__(self, join):
        super().__init__()
        self.wide, self.low = nn.Linear(6, 4), nn.Linear(6, 2, bias=False)
        self.back, self.last = nn.Linear(2, 4), nn.Linear(4, 3)
        self.join = join

    def forward(self, x):
        return self.last(torch.tanh(self.join(self, x)))


def added_in_place(model, x):
    h = model.wide(x)
    h += model.back(model.low(x))
    return h


def bent_in_place(model, x):
    h = model.wide(x)
    return functional.silu(h.add_(model.back(torch.tanh(model.low(x)))), inplace=True)


def residual(back, h):
    return functional.softplus(h + back(torch.tanh(h[:, 1:3])))


BRANCHES = {
    "low rank": lambda model, x: model.wide(x) + model.back(model.low(x)),
    "in place": added_in_place,
    "twice": lambda model, x: torch.sub(input=2 * model.wide(x), other=model.wide(x)),
    "less its mean": lambda model, x: model.wide(x - x.mean(1, keepdim=True)),
    "its mean less": lambda model, x: model.wide(x.mean(1, keepdim=True) - x),
    "beside": lambda model, x: torch.cat([model.wide(x)[:, 1:3], model.low(x)], 1),
    "stacked": lambda model, x: torch.stack([model.wide(x), model.back(model.low(x))], 1).sum(1),
    "apart": lambda model, x: torch.concat(model.wide(x).chunk(2, 1)[::-1], dim=-1),
    "three": lambda model, x: sum([model.wide(x), 2 * model.wide(x), model.back(model.low(x))]),
    "a scalar": lambda model, x: model.wide(x - x.mean(1)[:, None]),
    "unbound": lambda model, x: model.wide(torch.stack(x.unbind(1), 1)),
    "a constant beside": lambda model, x: model.wide(
        torch.cat([x[:, :5], torch.ones(len(x), 1)], 1)
    ),
    "nested": lambda model, x: model.wide(x - (x - x.mean(1, keepdim=True)).flip(1)),
    "that bend": lambda model, x: model.wide(x) + model.back(torch.sigmoid(model.low(x))),
    "that bend in place": bent_in_place,
    "that bend beside": lambda model, x: torch.cat([model.wide(x)[:, :2], model.low(x).tanh()], 1),
    "that bend apart": lambda model, x: functional.silu(model.wide(x)) - torch.atan(model.wide(x)),
    "of several bends": lambda model, x: (
        model.wide(x) + model.back(functional.mish(model.back(model.low(x).tanh())[:, 1:3]))
    ),
    "that bend nested": lambda model, x: residual(model.back, residual(model.back, model.wide(x))),
}
MOVES = {
    "chunk": lambda h: h.chunk(2, 1)[1],
    "split": lambda h: h.split([1, 3], dim=1)[1],
    "unbind": lambda h: h.unbind(1)[2],
    "expand": lambda h: h.mean(1, keepdim=True).expand(len(h), 3, -1, -1),
    "repeat": lambda h: h.repeat(1, 2, 1, 1),
    "tile": lambda h: h.tile(1, 1, 2, 1),
    "repeat_interleave": lambda h: h.repeat_interleave(2, 1),
    "index_select": lambda h: h.index_select(1, torch.tensor([2, 0])),
    "indices": lambda h: h[:, [3, 1]],
    "unfold": lambda h: functional.unfold(h, 2),
    "windows": lambda h: h.unfold(2, 2, 1),
    "nearest": lambda h: functional.interpolate(h, scale_factor=2),
    "upsample": nn.Upsample(scale_factor=2),
    "cumsum": lambda h: h.cumsum(1),
    "mT": lambda h: h.mT,
    "nan_to_num": lambda h: h.nan_to_num(),
}


def moved(move):
    """A convolution whose channels are moved about."""

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3, 2)
            size = move(torch.zeros(1, 4, 3, 3)).numel()
            self.last = nn.Linear(size, 3)

        def forward(self, x):
            return self.last(move(torch.tanh(self.first(x))).flatten(1))

    return Moved()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(x + torch.tanh(self.first(x)))


class ResidualBlock(nn.Module):
    """Two convolutions with normalisation, beside one of size 1."""

    def __init__(self, channels, outputs, stride):
        super().__init__()
        self.first = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(3))
        self.skip, self.act = nn.Conv2d(channels, outputs, 1, stride), nn.SiLU(inplace=True)

    def forward(self, x):
        y = self.norms[1](self.second(self.act(self.norms[0](self.first(x)))))
        y += self.norms[2](self.skip(x))
        return self.act(y)


def residual_convolutional():
    blocks = ResidualBlock(1, 3, 2), ResidualBlock(3, 4, 2)
    return settled(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))


FLATTENINGS = [
    lambda x: x.view(x.size(0), -1),
    lambda x: x.reshape(x.shape[0], 32),
    lambda x: x.view(-1, 32),
    lambda x: torch.flatten(x, 1),
    lambda x: x.flatten(2).flatten(start_dim=1),
    lambda x: x.permute(0, 2, 3, 1).transpose(1, 2).contiguous().view(len(x), -1),
    lambda x: x[:, :, None].squeeze(2).unflatten(1, (2, 4)).flatten(1),
]
FORMS = {
    **{f"forward {i}": (settled(Convolutional(f)), IMAGE) for i, f in enumerate(FLATTENINGS)},
    "conv1d": (
        nn.Sequential(nn.Conv1d(2, 4, 3, 2, 1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        (2, 12),
    ),
    "global pooling": (
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        IMAGE,
    ),
    "pooling": (nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9, 3)), IMAGE),
    "padding": (
        nn.Sequential(
            nn.ZeroPad2d(1), nn.ConstantPad2d(1, 0.5), nn.Conv2d(1, 2, 3, 2), nn.Tanh(),
            nn.Flatten(), nn.Linear(50, 3),
        ),
        IMAGE,
    ),
    **{
        f"{mode} padding": (
            nn.Sequential(
                nn.Conv2d(1, 2, 3, 2, 1, padding_mode=mode), nn.Tanh(), nn.Flatten(),
                nn.Linear(32, 3),
            ),
            IMAGE,
        )
        for mode in ("circular", "reflect", "replicate")
    },
    "batchnorm": (
        settled(
            nn.Sequential(
                nn.BatchNorm1d(6), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(),
                nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3),
            )
        ),
        VECTOR,
    ),
    "normalised": (nn.Sequential(Normalised(), nn.Flatten(), nn.Linear(64, 3)), IMAGE),
    "unflatten": (
        nn.Sequential(
            nn.Unflatten(1, IMAGE), nn.Conv2d(1, 2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
        ),
        (64,),
    ),
    "identity": (nn.Sequential(nn.Identity(), small(), nn.Identity()), VECTOR),
    "dropout": (small(nn.Tanh(), nn.Dropout(), nn.AlphaDropout(), nn.Dropout1d()).eval(), VECTOR),
    "subclasses": (nn.Sequential(Plain(6, 5), Smooth(), nn.Linear(5, 3)), VECTOR),
    "children": (nn.Sequential(*small(nn.Mish()).children()), VECTOR),
    "linears": (nn.Sequential(nn.Linear(6, 6), small(nn.Tanh(), nn.Linear(5, 5))), VECTOR),
    "silu in full": (Valued(lambda x, f: f(x * torch.sigmoid(x))), VECTOR),
    "swish": (Valued(lambda x, f: f(x * torch.sigmoid(1.702 * x))), VECTOR),
    "swish turned": (Valued(lambda x, f: f(torch.sigmoid(-1.5 * x) * x)), VECTOR),
    "unrolled": (Unrolled(), VECTOR),
    "mish in full": (Valued(lambda x, f: f(functional.softplus(x).tanh() * x)), VECTOR),
    "constants alike": (
        Valued(lambda x, f: f(x + torch.full_like(x, 0.5)) * torch.ones_like(f(x))), VECTOR
    ),
    **{f"branches {name}": (Branched(join), VECTOR) for name, join in BRANCHES.items()},
    "residual": (Residual(), VECTOR),
    "residual, convolutional": (residual_convolutional(), IMAGE),
    **{name: (moved(move), IMAGE) for name, move in MOVES.items()},
    "no hidden layer": (nn.Linear(6, 3), VECTOR),
    "activations": (nn.Sequential(nn.Tanh(), nn.Sigmoid(), nn.Linear(6, 3), nn.Tanh()), VECTOR),
    "data parallel": (nn.DataParallel(small()), VECTOR),
    "averaged": (AveragedModel(small()), VECTOR),
    "compiled": (torch.compile(small()), VECTOR),
    "spectral norm": (changed(parametrizations.spectral_norm), VECTOR),
    "weight norm": (changed(parametrizations.weight_norm), VECTOR),
    "weight of its own": (nn.Sequential(Exponential(6, 5), nn.Tanh(), nn.Linear(5, 3)), VECTOR),
    "older weight norm": (changed(nn.utils.weight_norm), VECTOR),
    "older spectral norm": (changed(nn.utils.spectral_norm), VECTOR),
    "pruned": (changed(lambda part: prune.random_unstructured(part, "weight", 0.5)), VECTOR),
    "tied": (tied(), VECTOR),
    "strided": (strided(), VECTOR),
    "scaled": (Scaled(*small()), VECTOR),
    "called": (Called(*small()), VECTOR),
    "posing": (nn.Sequential(Posing(), nn.Tanh(), nn.Linear(5, 3)), VECTOR),
    "negated": (of_another_class(), VECTOR),
    "own forward": (with_own_forward(), VECTOR),
    "hooks": (hooked(), VECTOR),
    "copied and written": (
        Valued(lambda x, f: f(x.clone().add_(1) + x.index_select(dim=1, index=torch.arange(6)))),
        VECTOR,
    ),
    "whole numbers": (
        Valued(lambda x, f: f(x * torch.arange(6) * (torch.arange(6) > 2) + torch.arange(6))),
        VECTOR,
    ),
    "in place": (small(nn.SiLU(inplace=True), nn.Linear(5, 5), nn.ELU(inplace=True)), VECTOR),
    "matrices": (nn.Sequential(nn.Linear(6, 5), nn.CELU(0.7), nn.Linear(5, 3, bias=False)), VECTOR),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(1, 2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(578, 3)),
        IMAGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_model_is_read_as_what_it_computes(name):
    model, shape = FORMS[name]
    x = torch.randn(9, *shape, generator=torch.Generator().manual_seed(0))
    read_network(model, at=x)  # in float32 as it is
    exact = copy.deepcopy(getattr(model, "_orig_mod", model)).double()
    network = read_network(exact, at=x.double())
    with torch.no_grad():
        expected = exact(x.double())
    logits = network.logits(x.flatten(1).double())
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.Softplus(2.0, threshold=5.0), nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.ELU()),
        *(nn.CELU(0.7), nn.LogSigmoid(), nn.Softsign(), nn.SiLU(), nn.Tanh(), nn.Sigmoid()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_activation_is_read(activation, dtype):
    model = small(activation).to(dtype)
    x = 5 * torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    network = read_network(model, at=x)
    assert RoundingModel.of(network).gap == (0.0, 0.0)
    gap = (network.logits(x.double()) - model.double()(x.double())).abs().max()
    assert gap <= 1e-12 + 5 * network.layers[0].activation.deviation


@pytest.mark.parametrize(
    ("ending", "function"),
    [
        ([], lambda z: z),
        ([nn.Sigmoid()], torch.sigmoid),
        ([nn.LogSigmoid()], functional.logsigmoid),
        ([nn.Flatten(0)], lambda z: z),
        ([nn.Sigmoid(), nn.Flatten(0)], torch.sigmoid),
    ],
)
def test_one_logit_is_read_as_two_classes(ending, function):
    model = one_logit(*ending)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    model[2].bias.data -= model[:3](x).mean()
    network = read_network(model, at=x)
    logits = network.logits(x.double())
    assert network.classes == 2 and (logits[:, 0] == 0).all()
    answers = model(x).reshape(-1)
    torch.testing.assert_close(function(logits[:, 1]).float(), answers)
    decided = answers > function(torch.zeros(()))
    assert torch.equal(logits.argmax(1), decided.long()) and 0 < decided.sum() < 9


@pytest.mark.parametrize(
    "head", [nn.Softmax(1), nn.Softmax(-1), nn.LogSoftmax(1), nn.Sigmoid(), nn.LogSigmoid()]
)
def test_a_head_that_changes_no_answer_is_left_out(head):
    model = small()
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    logits = read_network(model).logits(x.double())
    assert torch.equal(read_network(nn.Sequential(model, head), at=x).logits(x.double()), logits)


def test_compiled_and_parallel_parts_are_read_as_they_were_written():
    """And without compiling them, which would take a minute."""
    model = nn.Sequential(small(nn.Tanh()), nn.Tanh(), nn.Linear(3, 3))
    expected = read_network(model).layers
    inside = nn.Sequential(torch.compile(model[0]), *model[1:])
    parallel = nn.Sequential(nn.DataParallel(model[0]), *model[1:])
    itself = copy.deepcopy(model)
    itself.compile()
    for written in (inside, parallel, itself):
        for ours, theirs in zip(read_network(written).layers, expected, strict=True):
            assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision_are_read(dtype):
    x = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(0))
    model = settled(Convolutional(FLATTENINGS[3])).to(dtype)
    logits = read_network(model, at=x).logits(x.flatten(1).double())
    torch.testing.assert_close(logits, model.double()(x.double()))


def test_exported_programs_are_read():
    x = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(0))
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Mish(), nn.Flatten(), nn.Linear(72, 3)
    model = settled(nn.Sequential(Normalised(), *layers))
    batches = {0: torch.export.Dim("batch", min=2, max=1000)}
    program = torch.export.export(model, (x,), dynamic_shapes=(batches,))
    logits = read_network(program, at=x).logits(x.flatten(1).double())
    torch.testing.assert_close(logits.float(), model(x))


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.Softplus(), nn.Softplus(3.0, 30.0), nn.Softsign(), nn.LogSigmoid(), nn.CELU(0.3)),
        *(nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.ELU(), nn.Sigmoid(), nn.Tanh()),
    ],
)
@pytest.mark.parametrize("batch", [None, 4])
def test_decomposed_programs_are_read_as_the_model_itself(activation, batch):
    x = 3 * torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(0)).double()
    first, last = (nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), (nn.Flatten(), nn.Linear(72, 3))
    more = nn.BatchNorm1d(3, affine=False, eps=0.1)
    model = settled(nn.Sequential(*first, activation, *last, more).double())
    sizes = None if batch else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes).run_decompositions()
    read, own = read_network(program, at=x), read_network(model, at=x)
    torch.testing.assert_close(read.logits(x.flatten(1)), model(x), rtol=1e-12, atol=1e-12)
    rows = [(layer.activation.name, layer.activation.settings) for layer in read.layers]
    assert rows == [(layer.activation.name, layer.activation.settings) for layer in own.layers]


def thresholded(threshold=20.0, scale=2.0, divisor=2.0, turned=False, other=torch.log1p):
    """Softplus as torch's decompositions write it, or something like it."""

    def forward(x, f):
        z = f(x)
        scaled = z * scale
        curved = other(torch.exp(scaled)) / divisor
        far = torch.gt(torch.tensor(threshold), scaled) if turned else scaled > threshold
        return torch.where(far, z, curved)

    return Ended(forward)


class Ended(Valued):
    """A linear layer after what someone wrote out."""

    def __init__(self, look):
        super().__init__(look)
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(super().forward(x))


def test_an_activation_that_is_written_out_is_known_by_its_parts():
    read = read_network(thresholded())
    assert read.layers[0].activation.settings == (("beta", 2.0), ("threshold", 20.0))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    softsign = Ended(lambda x, f: f(x) / (1 + f(x).abs()))
    with pytest.raises(ValueError, match="abs has corners"):  # of two layers, though the same
        read_network(softsign)
    once = Ended(lambda x, f: (lambda z: z / (1 + z.abs()))(f(x))).double()
    network = read_network(once)
    assert network.layers[0].activation.name == "softsign"
    torch.testing.assert_close(network.logits(x.double()), once(x.double()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (thresholded(divisor=3.0), "gt looks at values"),
        (thresholded(turned=True), "gt looks at values"),
        (thresholded(scale=torch.tensor([1.0, 2.0, 3.0])), "gt looks at values"),
        (thresholded(other=torch.expm1), "gt looks at values"),
        (thresholded(scale=-2.0, divisor=-2.0), "gt looks at values"),
        (Ended(lambda x, f: torch.exp(f(x))), "exp is neither"),
        (Ended(lambda x, f: torch.exp(f(x)).tanh()), "exp is neither"),
        (Ended(lambda x, f: f(x) + f(x).abs()), "abs has corners"),
        (Ended(lambda x, f: f(x).abs().relu()), "abs has corners"),
        *(
            (Ended(lambda x, f, made=made: made(f(x))), message)
            for made, message in (
                (lambda z: z / (2 + z.abs()), "abs has corners"),
                (lambda z: (1 + z.abs()) / z, "abs has corners"),
                (lambda z: z * (1 + z.abs()), "abs has corners"),
                (lambda z: torch.where(z > 0, z, torch.expm1(z / 2)), "gt looks at values"),
                (lambda z: torch.where(z > 1, z, torch.expm1(z / 2) * 2), "gt looks at values"),
                (lambda z: torch.where(z > 0, torch.expm1(z / 2) * 2, z), "gt looks at values"),
                (
                    lambda z: (
                        torch.minimum(torch.tensor(1.0), z) - torch.log1p(torch.exp(-z.abs()))
                    ),
                    "minimum has corners",
                ),
                (
                    lambda z: (
                        torch.log1p(torch.exp(-z.abs())) - torch.minimum(torch.tensor(0.0), z)
                    ),
                    "abs has corners",
                ),
            )
        ),
    ],
)
def test_what_only_looks_like_an_activation_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        read_network(model)


@pytest.mark.parametrize("track", [True, False])
def test_a_program_that_takes_statistics_from_the_batch_is_refused(track):
    model = small(nn.BatchNorm1d(5, track_running_stats=track)).train(track)
    program = torch.export.export(model, (torch.randn(4, 6),)).run_decompositions()
    with pytest.raises(ValueError, match="batch_norm takes its statistics from the batch"):
        read_network(program)


@pytest.mark.parametrize("batch", [1, 3])
def test_programs_of_a_fixed_batch_are_read(batch):
    """As they are and as modules, for any number of inputs, whose shape they say themselves."""
    x = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(0))
    layers = nn.Conv2d(1, 2, 3), nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(72, 3)
    model = nn.Sequential(transforms.Normalize(0.1307, 0.3081), *layers)
    program = torch.export.export(model, (x[:batch],))
    for written in (program, program.module()):
        for at in (None, x):
            logits = read_network(written, at=at).logits(x.flatten(1).double())
            torch.testing.assert_close(logits.float(), model(x))


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda x, f: f(x - x.mean(0, keepdim=True)), "mean mixes the items"),
        (lambda x, f: f(x.sum(0, keepdim=True)), "sum mixes the items"),
        (lambda x, f: f(x.flip(0)), "flip mixes the items"),
        (lambda x, f: f(x[0])[None], "select mixes the items"),
        (lambda x, f: f(x).relu(), "relu has corners"),
    ],
)
@pytest.mark.parametrize("batch", [1, 6])
def test_programs_of_a_fixed_batch_that_mix_it_are_refused(look, message, batch):
    program = torch.export.export(Valued(look), (torch.zeros(batch, 6),))
    with pytest.raises(ValueError, match=message):
        read_network(program)


def test_a_constant_for_each_place_in_a_fixed_batch_is_refused():
    model = Valued(lambda x, f: f(x - torch.arange(6.0)[:, None]))
    with pytest.raises(ValueError, match=r"constant of shape \(6, 1\)"):
        read_network(torch.export.export(model, (torch.zeros(6, 6),)))


MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def constants(make):
    """A normalisation by two constants that are made in ``forward``."""

    def look(x, layer):
        mean, deviation = (make(x, values).view(-1, 1, 1) for values in (MEAN, DEVIATION))
        return layer(((x - mean) / deviation).flatten(1))

    return look


NORMALISATIONS = {
    "v1": lambda x, f: f(transforms.Normalize(MEAN, DEVIATION)(x).flatten(1)),
    "v2": lambda x, f: f(v2.Normalize(MEAN, DEVIATION)(x).flatten(1)),
    "in place": lambda x, f: f(v2.Normalize(MEAN, DEVIATION, inplace=True)(x).flatten(1)),
    "function": lambda x, f: f(transforms.functional.normalize(x, MEAN, DEVIATION).flatten(1)),
    "as_tensor": constants(lambda x, c: torch.as_tensor(c, dtype=x.dtype, device=x.device)),
    "to": constants(lambda x, c: torch.tensor(c, dtype=torch.float64).to(x)),
    "to by name": constants(lambda x, c: torch.tensor(c, dtype=torch.float64).to(tensor=x)),
    "type_as": constants(lambda x, c: torch.tensor(c, dtype=torch.float64).type_as(x)),
    "new_tensor": constants(lambda x, c: x.new_tensor(c)),
    "new_full": constants(lambda x, c: torch.cat([x.new_full((1,), value) for value in c])),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMALISATIONS)
def test_constants_are_read_as_the_model_rounds_them(name, dtype):
    model = Valued(NORMALISATIONS[name])
    model.layer = nn.Linear(48, 3)
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = read_network(model.to(dtype), at=x.to(dtype))
    mean, deviation = (
        torch.tensor(values, dtype=dtype).double().view(-1, 1, 1) for values in (MEAN, DEVIATION)
    )
    expected = model.layer.double()(((x - mean) / deviation).flatten(1))
    torch.testing.assert_close(network.logits(x.flatten(1)), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["v2", "as_tensor", "to", "type_as", "new_tensor", "new_full"])
def test_constants_of_a_program_are_read_too(name):
    model = Valued(NORMALISATIONS[name])
    model.layer = nn.Linear(48, 3)
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    logits = read_network(torch.export.export(model, (x[:1],))).logits(x.flatten(1).double())
    torch.testing.assert_close(logits.float(), model(x))


def test_a_model_is_read_as_it_is_in_its_own_dtype():
    model = Valued(lambda x, f: f(x) if x.dtype == torch.float32 else -f(x))
    assert torch.equal(read_network(model).layers[0].weight, model.layer.weight.double())
    hidden = Valued(
        lambda x, f: f(x) * (1.5 if type(x) is torch.Tensor and x.dtype == torch.float32 else 1)
    )
    with pytest.raises(ValueError, match="computes something else"):
        read_network(hidden)
    copied = Valued(
        lambda x, f: f(x) * (1.5 if type(x) is torch.Tensor and x.dtype == torch.float64 else 1)
    )
    with pytest.raises(ValueError, match="computes something else"):
        read_network(copied)


def replaced(name, tensor):
    """A small model whose first layer has another tensor for a parameter."""
    model = small()
    delattr(model[0], name)
    setattr(model[0], name, tensor)
    return model


class Doubled(torch.Tensor):
    """A tensor with a linear map of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * result if function is functional.linear else result


def written_through(write, after=False):
    """A forward pass that writes into a view and goes on with what it is a view of."""

    def forward(x, f):
        h = f(x)
        view = h[:, 1:]
        write(h)
        return view if after else h

    return forward


class HalfOfItsInput(nn.Module):
    """It rounds its input, and writes into a view: no float64 copy of it can be evaluated."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.to(torch.bfloat16)) + 1))


def called_otherwise():
    model = small()
    model[0]._compiled_call_impl = lambda x: x[:, :5]
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replaced("bias", nn.Parameter(torch.ones(1))), r"bias of shape \(5,\).*got \(1,\)"),
        (replaced("bias", nn.Parameter(torch.ones(()))), r"bias of shape \(5,\).*got \(\)"),
        (replaced("bias", nn.Parameter(torch.ones(1, 5))), r"bias of shape \(5,\)"),
        (replaced("bias", torch.ones(5, dtype=torch.int64)), "must be real.*int64"),
        (replaced("bias", nn.Parameter(torch.ones(5) + 1j)), "must be real.*complex64"),
        (replaced("bias", nn.Parameter(torch.ones(5).double())), "cannot be evaluated"),
        (replaced("weight", torch.ones(5, 6, dtype=torch.bool)), "must be real.*bool"),
        (replaced("weight", nn.Parameter(torch.ones(6))), "must be .outputs, inputs."),
        (replaced("weight", torch.ones(5, 6).to(torch.float8_e5m2)), "float64; got torch.float8"),
        (replaced("weight", torch.ones(5, 6, device="meta")), "dense tensor; got a meta"),
        (small().to("meta"), "dense tensor; got a meta"),
        (replaced("weight", torch.eye(5, 6).to_sparse()), "dense tensor; got a torch.sparse"),
        (replaced("weight", torch.ones(5, 6).as_subclass(Doubled)), "plain torch.Tensor"),
        (replaced("bias", torch.ones(5).as_subclass(Doubled)), "plain torch.Tensor"),
        (
            nn.Sequential(nn.LazyLinear(3), nn.Tanh()),
            r"0\.weight has no shape yet.*once, model\(x\)",
        ),
        (called_otherwise(), "another call put in place of its own"),
        (small(nn.ReLU()), r"ReLU\(\): relu has corners.*Certify your own network.*2 Linear"),
        (small(nn.Hardswish()), "hardswish has corners"),
        (small(nn.ELU(2.0)), r"elu has a corner unless alpha is 1 \(here 2\)"),
        (small(nn.MaxPool1d(1)), "max pooling has corners.*average pooling"),
        (
            small(nn.LayerNorm(5)),
            "layer_norm divides.*BatchNorm in eval mode.*2 Linear, 1 LayerNorm",
        ),
        (
            small(nn.Unflatten(1, (1, 5)), nn.Upsample(scale_factor=2, mode="linear")),
            "mode='linear' is a linear map that crcbook does not read yet",
        ),
        (
            Valued(lambda x, f: f(torch.fft.fft(x).real)),
            "fft.* is a linear map that crcbook does not read yet",
        ),
        (small(nn.PReLU()), "PReLU: it has a corner"),
        (nn.Sequential(nn.LSTM(6, 3)), "LSTM: a recurrent network"),
        (nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0).eval(), "attention multiplies"),
        (small(nn.Dropout()), r"draws at random: call model\.eval"),
        (small(nn.BatchNorm1d(5)), r"from the batch: call model\.eval"),
        (small(parametrizations.spectral_norm(nn.Linear(5, 5))), r"model\.eval|training mode"),
        (
            Valued(lambda x, f: f(x) + f(x).softmax(1)),
            "add follows softmax, which must be the last",
        ),
        (Valued(lambda x, f: f(x - x.mean(1))), r"takes \(batch, 6\) and \(batch\): keep the dim"),
        (Valued(lambda x, f: torch.cat([f(x), f(x)])), "cat puts items into the batch"),
        (
            Valued(lambda x, f: torch.cat([f(x), torch.arange(3.0)[:, None]], 1)),
            "must be the same for every item",
        ),
        (Valued(lambda x, f: torch.add(x, 1.0, out=f(x))), "leave out= away"),
        (Valued(written_through(lambda h: h[:, :2].add_(1))), "through another view"),
        (Valued(written_through(lambda h: h.chunk(2, 1)[0].mul_(2))), "through another view"),
        (Valued(written_through(lambda h: h.view(-1, 3).neg_())), "through another view"),
        (Valued(written_through(lambda h: h.detach().add_(1))), "through another view"),
        (Valued(written_through(lambda h: h.tanh_(), after=True)), "through another view"),
        (Valued(lambda x, f: torch.add(f(x), f(x), alpha=2)), "without alpha"),
        (Valued(lambda x, f: f(x).unbind(0)[0]), "unbind mixes the items"),
        (Valued(lambda x, f: f(x).T), "T mixes the items"),
        (Valued(lambda x, f: f(x.expand(2, 3, 6)[0])), "expand adds a dimension"),
        (Valued(lambda x, f: torch.hypot(f(x), f(x))), "hypot joins two branches, and is read"),
        (Valued(lambda x, f: f(x / x.norm(dim=1, keepdim=True))), "norm is a size of the item's"),
        (Valued(lambda x, f: f(torch.maximum(x, torch.zeros_like(x)))), "maximum has corners"),
        (Valued(lambda x, f: f(torch.where(x > 0, x, -x))), "gt looks at values"),
        (Valued(lambda x, f: f(x) if x.isfinite().all() else x), "isfinite looks at values"),
        (small(nn.BatchNorm1d(5, track_running_stats=False)).eval(), "keeps none"),
        (Valued(lambda x, f: torch.bmm(x[:, None], x[:, :, None])[:, 0]), "bmm multiplies what"),
        (Valued(lambda x, f: f(x + torch.randn_like(x))), "randn_like is neither"),
        (Valued(lambda x, f: f(x) if x.sum() > 0 else -f(x)), "sum|looks at values"),
        (Valued(lambda x, f: f(x) if x[0, 0].item() > 0 else -f(x)), "select|item|__getitem__"),
        (Valued(lambda x, f: f(x) * f(x)), "mul multiplies what depends"),
        (Valued(lambda x, f: f(x * torch.sigmoid(2 * x + 1))), "mul multiplies what depends"),
        (
            Valued(lambda x, f: f(x * functional.softplus(x, 2).tanh())),
            "mul multiplies what depends",
        ),
        (Valued(lambda x, f: f(x) / 0), "divides by zero"),
        (Valued(lambda x, f: 1 / f(x)), "neither an affine map"),
        (Valued(lambda x, f: f(x.flip(0))), "flip mixes the items"),
        (
            Valued(lambda x, f: f(x - torch.arange(18.0).reshape(3, 6))),
            r"constant of shape \(3, 6\) beside \(batch, 6\)",
        ),
        (Valued(lambda x, f: f(x - torch.ones(3, 6))), "cannot be evaluated on"),
        (Valued(lambda x, f: (f(x),)), "must give one tensor"),
        (Valued(lambda x, f: f(x).softmax(1) * 2), "something follows softmax"),
        (Valued(lambda x, f: f(x).softmax(0)), "over the classes"),
        (Valued(lambda x, f: f(torch.zeros(len(x), 6))), "depend on x"),
        (Valued(lambda x, f: x.new_zeros(len(x), 3)), "depend on x"),
        (Valued(lambda x, f: torch.full_like(x, 2.0)), "depend on x"),
        (Valued(lambda x, f: f(x)[:, None]), r"must give .batch, classes.; got .batch, 1, 3"),
        (one_logit(nn.Softmax(1)), "softmax over one class"),
        (
            nn.Sequential(nn.Flatten(0), nn.Linear(6, 3)),
            r"flatten makes.*\(18,\) of 3 items, \(batch, 6\)",
        ),
        (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(3, 2)), "3 inputs are needed"),
        (nn.Sequential(nn.Flatten(), nn.Tanh()), "must have a linear layer"),
        (torch.jit.script(small()), "scripted"),
        (small(nn.Softplus(beta=-1.0)), "needs beta from"),
    ],
)
def test_what_cannot_be_certified_is_refused_with_its_reason(model, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_network(model, at=torch.randn(7, 6, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("weight_norm", [nn.utils.weight_norm, parametrizations.weight_norm])
def test_the_shape_of_an_input_is_that_of_the_weight_and_not_of_what_it_is_made_of(weight_norm):
    """The older one holds what was made of its parameters, which cannot be copied."""
    model = changed(weight_norm)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert read_network(model).inputs == 6
    made = weight_norm(nn.Linear(6, 5))
    fresh = nn.Sequential(made, nn.Tanh(), nn.Linear(5, 3))
    logits = read_network(fresh).logits(x.double())
    with torch.no_grad():
        expected = fresh.double()(x.double())
    torch.testing.assert_close(logits, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.5, 1.0, 10.0])
def test_a_softplus_that_overflows_is_read_and_a_wrong_one_seen(beta, dtype, monkeypatch):
    """Without a threshold torch evaluates an exponential that overflows, and gives infinity."""
    torch.manual_seed(0)
    model = small(nn.Softplus(beta, threshold=1e6)).to(dtype)
    model[0].weight.data.abs_()  # far out on the diagonal every unit overflows
    assert not model(torch.full((1, 6), 1e4, dtype=dtype)).isfinite().all()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    network = read_network(model, at=x)
    torch.testing.assert_close(network.logits(x.double()).to(dtype), model(x))
    softplus = functional.softplus
    monkeypatch.setattr(
        nn.Softplus, "forward",
        lambda self, z: softplus(z, beta, 1e6) * (1.001 if type(z) is torch.Tensor else 1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="computes something else"):
        read_network(model, at=x)


def test_a_map_too_large_for_a_matrix_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 40, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27040, 2))
    with pytest.raises(ValueError, match=r"conv2d has a matrix of 21,199,360 entries"):
        read_network(model, at=torch.zeros(1, 1, 28, 28))


def test_the_shape_of_an_input_must_be_known():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 2))
    with pytest.raises(ValueError, match="give inputs"):
        read_network(model)
    assert read_network(model, at=torch.zeros(1, *IMAGE)).inputs == 64
    for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(2, 64)):
        with pytest.raises(ValueError, match="Conv2d"):
            read_network(model, at=wrong)
    with pytest.raises(TypeError, match="floating-point tensor"):
        read_network(model, at=[1.0])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module; got list"):
        read_network([nn.Linear(4, 2)])


def test_a_broadcast_bias_gets_no_radius():
    model = nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 2)).double()
    model[0].bias = nn.Parameter(torch.full((1,), -1.0, dtype=torch.float64))
    x = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="one number an output"):
        crc.certify(model, x, model(x).argmax(1))


def test_reading_leaves_the_model_as_it_was():
    model = small(parametrizations.spectral_norm(nn.Linear(5, 5)), nn.SiLU(inplace=True))
    for mode in (True, False):
        model.train(mode)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) if mode else torch.no_grad():
            read_network(model)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
    assert model[1].weight.shape == (5, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_hides_from_the_reader_is_seen_in_the_comparison(monkeypatch, dtype):
    """A method that tells a real tensor from one that is recorded."""
    model, linear = small().to(dtype), functional.linear

    def deceptive(self, x):
        return linear(x, self.weight, self.bias) * (1.5 if type(x) is torch.Tensor else 1)

    monkeypatch.setattr(nn.Linear, "forward", deceptive)
    with pytest.raises(ValueError, match="computes something else"):
        read_network(model)
    monkeypatch.undo()
    read_network(model)


def test_a_difference_at_the_inputs_alone_is_seen(monkeypatch):
    model = small(nn.Tanh()).double()
    x = torch.full((5, 6), 7.25, dtype=torch.float64)
    z = model[0](x[0])

    def deceptive(self, a):
        return a.tanh() + ((a == z).all(1)[:, None] if type(a) is torch.Tensor else 0)

    monkeypatch.setattr(nn.Tanh, "forward", deceptive)
    read_network(model)
    with pytest.raises(ValueError, match="computes something else"):
        read_network(model, at=x)


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Dispatch])
def test_modes_that_may_change_operations_are_refused(mode):
    with mode(), pytest.raises(RuntimeError, match="leave it first"):
        read_network(small())


def test_a_default_device_is_no_such_mode():
    with torch.device("cpu"), torch.inference_mode():
        read_network(small())


@given(random_networks(), st.integers(0, 2**20), st.booleans())
def test_a_change_of_any_number_is_seen(case, number, of_weight):
    """Of any number whose change is more than a rounding error of the logits."""
    model, _ = case
    network = read_network(model)
    place = number % len(network.layers)
    layer = network.layers[place]
    tensor = (layer.weight if of_weight else layer.bias).clone()
    tensor.view(-1)[number % tensor.numel()] += 1e-5 * (1 + float(tensor.abs().max()))
    changed = replace(layer, **{"weight" if of_weight else "bias": tensor})
    wrong = Network((*network.layers[:place], changed, *network.layers[place + 1 :]))
    x = torch.ones(1, network.inputs, dtype=torch.float64)
    logits = network.logits(x)
    assume((wrong.logits(x) - logits).abs().max() > 1e-10 * (1 + logits.abs().max()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_built", lambda *_: wrong)
        with pytest.raises(ValueError, match="computes something else"):
            read_network(model, at=x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(case=random_networks())
def test_true_networks_pass_in_every_precision(dtype, case):
    model, generator = case
    at = 100 * torch.randn(3, model[1].in_features, generator=generator, dtype=torch.float64)
    read_network(model.to(dtype), at=at)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_weights_of_any_size_pass(scale):
    for activation in crc.ACTIVATIONS:
        model = crc.mlp([8, 64, 64, 3], activation)
        with torch.no_grad():
            model[1].weight.mul_(scale)
        read_network(model)
        read_network(model.double())


def test_a_convolution_is_its_weights_exactly():
    """Every entry of the matrix is one of the stored numbers."""
    for padding in ("zeros", "circular"):
        convolution = nn.Conv2d(2, 3, 3, 2, 1, 1, padding_mode=padding).double()
        model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(48, 2).double())
        network = read_network(model, at=torch.zeros(1, 2, 8, 8).double())
        entries = network.layers[0].weight[network.layers[0].weight != 0]
        assert torch.isin(entries, convolution.weight).all()
        count = network.layers[0].weight.count_nonzero(1)
        assert (count == 18).all() if padding == "circular" else (count <= 18).all()
    assert network.layers[1].weight_error == 0 and RoundingModel.of(network).gap[1] == 0


def exact_matrix(module, size):
    """What one affine module does to vectors of a size, as rows of mpmath numbers and a shift."""
    exact = mpmath.mpf
    if isinstance(module, nn.Linear):
        return module.weight.tolist(), module.bias.tolist()
    if isinstance(module, nn.BatchNorm1d):
        roots = [mpmath.sqrt(exact(v) + exact(module.eps)) for v in module.running_var.tolist()]
        scales = [exact(g) / root for g, root in zip(module.weight.tolist(), roots, strict=True)]
        facts = zip(module.bias.tolist(), module.running_mean.tolist(), scales, strict=True)
        shift = [exact(b) - exact(mean) * scale for b, mean, scale in facts]
    elif isinstance(module, Branches):
        low, back = (mpmath.matrix(m.weight.tolist()) for m in (module.low, module.back))
        whole = mpmath.eye(size) - back * low
        return whole.tolist(), [-exact(b) for b in module.back.bias.tolist()]
    elif isinstance(module, Arithmetic):
        scales = [exact(module.factor) / exact(module.divisor)] * size
        shift = [exact(module.shift)] * size
    else:  # pairs are averaged
        return [[exact(j // 2 == i) / 2 for j in range(size)] for i in range(size // 2)], [0] * (
            size // 2
        )
    return [[scales[i] * (i == j) for j in range(size)] for i in range(size)], shift


class Arithmetic(nn.Module):
    def __init__(self, factor, divisor, shift):
        super().__init__()
        self.factor, self.divisor, self.shift = factor, divisor, shift

    def forward(self, x):
        return self.shift + x * self.factor / self.divisor


class Branches(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.low, self.back = nn.Linear(size, 2, bias=False), nn.Linear(2, size)

    def forward(self, x):
        return x - self.back(self.low(x))


class Added(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x + self.number


class Pairs(nn.Module):
    def forward(self, x):
        return functional.avg_pool1d(x[:, None], 2)[:, 0]


@st.composite
def affine_chains(draw):
    """Affine modules on vectors, one after another, and their number of inputs."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    inputs = size = draw(st.sampled_from([2, 4, 6]))
    chain, number = [], st.floats(-9, 9).filter(lambda value: abs(value) > 0.1)
    kinds = st.sampled_from(["linear", "norm", "numbers", "pairs", "branches"])
    for kind in draw(st.lists(kinds, max_size=4)):
        if kind == "pairs" and size % 2 == 0 and size > 2:
            chain.append(Pairs())
            size //= 2
        elif kind == "norm":
            chain.append(nn.BatchNorm1d(size))
        elif kind == "branches":
            chain.append(Branches(size))
        elif kind == "numbers":
            chain.append(Arithmetic(draw(number), draw(number), draw(number)))
        else:
            outputs = draw(st.sampled_from([2, 3, 4]))
            chain.append(nn.Linear(size, outputs))
            size = outputs
    return settled(nn.Sequential(*chain, nn.Linear(size, 3)).double()), inputs


@settings(max_examples=25)
@given(affine_chains())
def test_a_product_of_maps_is_off_by_no_more_than_it_says(case):
    model, inputs = case
    network = read_network(model, at=torch.randn(3, inputs).double())
    layer = network.layers[0]
    with mpmath.workdps(50):
        weight, bias, size = mpmath.eye(inputs), mpmath.zeros(inputs, 1), inputs
        for part in model:
            rows, shift = exact_matrix(part, size)
            matrix = mpmath.matrix(rows)
            weight, bias = matrix * weight, matrix * bias + mpmath.matrix(shift)
            size = len(shift)
        off = mpmath.mnorm(weight - mpmath.matrix(layer.weight.tolist()), "f")
        off_bias = mpmath.norm(bias - mpmath.matrix(layer.bias.tolist()))
    assert off <= layer.weight_error and off_bias <= layer.bias_error
    alone = len(model) == 1
    assert (layer.weight_error == 0 and layer.bias_error == 0) if alone else True
    assert layer.weight_error <= 1e-11 * (1 + float(off) + 100 ** len(model))


@given(st.lists(st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-30), min_size=2, max_size=4))
def test_sums_of_numbers_are_off_by_no_more_than_they_say(numbers):
    layer = nn.Linear(1, 2).double()
    layer.bias.data[:] = numbers[0]
    model = nn.Sequential(layer, *(Added(number) for number in numbers[1:]))
    read = read_network(model, at=torch.zeros(1, 1).double()).layers[0]
    off = sum(map(Fraction, numbers)) - Fraction(float(read.bias[0]))
    assert 2 * off**2 <= Fraction(read.bias_error) ** 2 and read.weight_error == 0
    assert read.bias_error <= 2**-49 * sum(map(abs, numbers))


@st.composite
def convolutional_models(draw):
    """A small convolutional classifier of images of 6 by 6 pixels."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    channels, stride = draw(st.sampled_from([2, 4])), draw(st.sampled_from([1, 2]))
    groups, padding = draw(st.sampled_from([1, 2])), draw(st.sampled_from([0, 1, "same"]))
    stride = 1 if padding == "same" else stride
    act = draw(st.sampled_from([nn.Softplus, nn.Tanh, nn.Mish, nn.ELU, nn.Softsign]))
    parts = [nn.Conv2d(2, channels, 3, stride, padding, groups=groups), act()]
    parts[1:1] = draw(st.sampled_from([[], [nn.BatchNorm2d(channels)], [nn.AvgPool2d(2)]]))
    size = nn.Sequential(*parts).eval()(torch.zeros(1, 2, 6, 6)).shape
    if min(size[2:]) >= 2 and draw(st.booleans()):
        parts += [nn.Conv2d(channels, 3, 2, dilation=1), nn.AdaptiveAvgPool2d(1), act()]
    model = nn.Sequential(*parts, nn.Flatten(), nn.LazyLinear(3)).eval()
    model(torch.zeros(1, 2, 6, 6))
    return settled(model).double()


def dense(network):
    """The network that was read, as a Sequential of Linear layers."""
    modules = {"softplus": nn.Softplus, "tanh": nn.Tanh, "mish": nn.Mish, "elu": nn.ELU}
    modules |= {"softsign": nn.Softsign, "identity": nn.Identity}
    parts = []
    for layer in network.layers:
        linear = nn.Linear(*reversed(layer.weight.shape)).double()
        linear.weight.data, linear.bias.data = layer.weight, layer.bias
        parts += [linear, modules[layer.activation.name]()]
    return nn.Sequential(*parts)


@settings(max_examples=25)
@given(convolutional_models(), st.integers(0, 2**31))
def test_no_attack_enters_a_certified_ball(model, seed):
    """Radii of what was read, and an attack on the model itself."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 2, 6, 6, generator=generator, dtype=torch.float64)
    network = read_network(model, at=x)
    torch.testing.assert_close(network.logits(x.flatten(1)), model(x), rtol=1e-10, atol=1e-10)
    y = model(x).argmax(1)
    cert = crc.certify(dense(network), x.flatten(1), y)
    assert (cert.radius > 0).all()
    radius = cert.radius.clamp(max=1e3).reshape(-1, 1, 1, 1) * (1 - 1e-6)
    point = x + radius * functional.normalize(
        torch.randn(x.shape, generator=generator, dtype=torch.float64).flatten(1)
    ).reshape(x.shape)
    for _ in range(10):
        point = point.detach().requires_grad_()
        logits = model(point)
        own = logits.gather(1, y[:, None]).squeeze(1)
        others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        assert (own > others).all()
        (slope,) = torch.autograd.grad((own - others).sum(), point)
        way = point - x - radius * functional.normalize(slope.flatten(1)).reshape(x.shape)
        point = x + radius * functional.normalize(way.flatten(1)).reshape(x.shape)


class Guarded(nn.Module):
    """A model that looks at numbers and catches what that raises while it is being read."""

    def __init__(self):
        super().__init__()
        self.inner = crc.mlp([4, 8, 3])

    def forward(self, x):
        try:
            far = x.abs().amax(1, keepdim=True) > 6e3
            return torch.where(far, torch.tensor([0.0, 0.0, 1.0]), self.inner(x))
        except (ValueError, RuntimeError):
            return self.inner(x)


def test_a_model_cannot_catch_its_refusal():
    with pytest.raises(ValueError, match="catches an error"):
        read_network(Guarded())


class OverflowingHalf(nn.Module):
    """A model of half precision that no float64 copy can follow, and that overflows in between."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6).half(), nn.Linear(6, 3).half()
        with torch.no_grad():
            self.first.bias.fill_(6e4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.to(torch.float16))))


def test_a_model_that_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="its float64 copy cannot be evaluated"):
        read_network(OverflowingHalf())


def test_a_half_model_without_a_float64_copy_is_refused():
    with pytest.raises(ValueError, match="let it keep the dtype of its input"):
        read_network(HalfOfItsInput().bfloat16())


def test_many_indices_are_told_apart():
    """What is remembered of a model is not found for one with another NumPy array of indices."""
    weight = torch.randn(2, 1500, generator=torch.Generator().manual_seed(0))
    x, order = weight[:1] * 3, np.arange(1500)
    for swap in (700, 800):
        own = order.copy()
        own[[swap, swap + 1]] = own[[swap + 1, swap]]
        model = Valued(lambda x, f, own=own: functional.linear(torch.tanh(x)[:, own], weight))
        network = read_network(model, at=x)
        torch.testing.assert_close(network.logits(x.double()).float(), model(x))


class WithMish(nn.Module):
    """Mish written out, with a threshold of softplus."""

    def __init__(self, threshold):
        super().__init__()
        self.first, self.last, self.threshold = nn.Linear(4, 6), nn.Linear(6, 3), threshold

    def forward(self, x):
        z = self.first(x)
        return self.last(z * torch.tanh(functional.softplus(z, threshold=self.threshold)))


def test_mish_is_known_by_its_threshold_too():
    assert read_network(WithMish(20.0)).layers[0].activation.name == "mish"
    with pytest.raises(ValueError, match="multiplies what"):
        read_network(WithMish(1.0))


def test_a_constant_less_the_input_is_read_from_a_program_too():
    model = nn.Sequential(Reversed(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for read in (read_network(model), read_network(program)):
        torch.testing.assert_close(read.logits(x.double()).float(), model(x))


class Reversed(nn.Module):
    """The input, mirrored."""

    def forward(self, x):
        return torch.rsub(x, 2.0)


def padded(left, right, linear, last):
    return nn.Sequential(nn.ConstantPad1d((left, right), 0.0), linear, nn.Softplus(), last)


def test_what_is_proved_of_a_network_is_not_taken_for_another(monkeypatch):
    """Two models whose arguments, written one after another, are the same text."""
    torch.manual_seed(0)
    linear, last = nn.Linear(20, 16).double(), nn.Linear(16, 3).double()
    with torch.no_grad():
        linear.weight[:, :11] *= 1e-3
    first, second = padded(1, 11, linear, last), padded(11, 1, linear, last)
    x = torch.randn(50, 8, dtype=torch.float64)
    alone = crc.certify(second, x).radius
    crc.certify(first, x)
    monkeypatch.setattr(module, "_memory", OrderedDict())  # the readings, not what is proved
    torch.testing.assert_close(crc.certify(second, x).radius, alone, rtol=0, atol=0)
    keys = {read_network(model, at=x).key for model in (first, second)}
    assert len(keys) == 2


def facts():
    """Facts, nested as steps have them."""
    leaves = st.integers(-20, 20) | st.text("1,(): ", max_size=4) | st.none()
    return st.recursive(leaves, lambda parts: st.lists(parts, max_size=3).map(tuple))


@given(facts(), facts())
def test_facts_that_differ_have_hashes_that_do(first, second):
    assert (module._hash([first]) == module._hash([second])) == (first == second)


class Averaged(nn.Module):
    """Many equal units, averaged in one sum before they bend."""

    def __init__(self, units, with_channels):
        super().__init__()
        self.first, self.last = nn.Linear(3, units).double(), nn.Linear(1, 2).double()
        self.pool, self.with_channels = nn.AvgPool2d((units, 1)), with_channels

    def forward(self, x):
        z = self.first(x)
        z = z.reshape(len(x), 1, -1, 1) if self.with_channels else z.reshape(len(x), -1, 1)
        return self.last(functional.softplus(self.pool(z).flatten(1), threshold=200.0))


@pytest.mark.parametrize("with_channels", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_rounding_of_a_pool_is_in_the_radius(with_channels, sign):
    """In real arithmetic: each weight of the mean of so many numbers is rounded a little."""
    weight, model = 0.7, Averaged(2500, with_channels)
    x = torch.full((1, 3), 1e4, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight.fill_(weight)
        model.first.bias.zero_()
        model.last.weight.copy_(torch.tensor([[sign], [0.0]]))
        model.last.bias.zero_()
        model.last.bias[0] = -sign * (3e4 * weight - sign * 1e-3)
    radius = crc.certify(model, x).radius.item()
    # Softplus is the identity here, to all digits; the margin is linear in the three inputs.
    exact = sum(Fraction(value) for value in x[0].tolist()) * Fraction(weight)
    left = abs(exact - abs(Fraction(model.last.bias[0].item())))
    slope_squared = 3 * Fraction(weight) ** 2
    assert radius > 0 and Fraction(radius) ** 2 * slope_squared <= left**2


def test_images_without_channels_are_named_by_what_they_lack():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(ValueError, match=r"channels, height, width\); got \(batch, 8, 8\)"):
        read_network(model, at=torch.zeros(6, 8, 8))
