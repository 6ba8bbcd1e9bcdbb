"""What is read is what the model computes: every way found to compute something else is refused."""

from dataclasses import replace

import pytest
import torch
from conftest import random_networks
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import crcbook as crc
from crcbook.networks import Network, read_network
from crcbook.networks.comparing import compare


def small():
    return nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 2))


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
        return 2 * result if function is nn.functional.linear else result


class Negated(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class Posing(nn.Module):
    """A module that calls itself a Linear one."""

    __class__ = nn.Linear
    weight, bias = torch.ones(3, 4), torch.ones(3)

    def forward(self, x):
        return x[:, :3]


def of_another_class():
    model = small()
    model[0].__class__ = Negated
    return model


def called_otherwise():
    model = small()
    model[0]._compiled_call_impl = lambda x: x[:, :3]
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replaced("bias", nn.Parameter(torch.ones(1))), r"bias of shape \(3,\).*got \(1,\)"),
        (replaced("bias", nn.Parameter(torch.ones(()))), r"must be \(outputs\); got shape \(\)"),
        (replaced("bias", nn.Parameter(torch.ones(1, 3))), r"must be \(outputs\)"),
        (replaced("bias", torch.ones(3, dtype=torch.int64)), "must be real.*int64"),
        (replaced("bias", nn.Parameter(torch.ones(3) + 1j)), "must be real.*complex64"),
        (replaced("bias", nn.Parameter(torch.ones(3).double())), "cannot be evaluated"),
        (replaced("weight", torch.ones(3, 4, dtype=torch.bool)), "must be real.*bool"),
        (replaced("weight", nn.Parameter(torch.ones(4))), "must be .outputs, inputs."),
        (replaced("weight", torch.ones(3, 4).to(torch.float8_e5m2)), "must be real.*float8"),
        (replaced("weight", torch.ones(3, 4, device="meta")), "dense tensor; got a meta"),
        (replaced("weight", torch.eye(3, 4).to_sparse()), "dense tensor; got a torch.sparse"),
        (replaced("weight", torch.ones(3, 4).as_subclass(Doubled)), "plain torch.Tensor"),
        (replaced("bias", torch.ones(3).as_subclass(Doubled)), "plain torch.Tensor"),
        (nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2)), "cannot certify LazyLinear"),
        (nn.Sequential(Negated(4, 3), nn.Tanh(), nn.Linear(3, 2)), "cannot certify the layer"),
        (nn.Sequential(Posing(), nn.Tanh(), nn.Linear(3, 2)), "cannot certify the layer"),
        (of_another_class(), "cannot certify the layer"),
        (called_otherwise(), "compiled"),
    ],
)
def test_what_computes_something_else_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        read_network(model)


def test_a_broadcast_bias_gets_no_radius():
    model = nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 2)).double()
    model[0].bias = nn.Parameter(torch.full((1,), -1.0, dtype=torch.float64))
    x = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="one number an output"):
        crc.certify(model, x, model(x).argmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_patched_operations_are_seen(monkeypatch, dtype):
    model, linear = small().to(dtype), nn.functional.linear
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda x, *others: linear(1.5 * x, *others))
        with pytest.raises(ValueError, match="computes something else"):
            read_network(model)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: linear(x, self.weight))
        with pytest.raises(ValueError, match="computes something else"):
            read_network(model)
    read_network(model)


def test_a_difference_at_the_inputs_alone_is_seen(monkeypatch):
    tanh, model = torch.tanh, nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.full((5, 4), 7.25, dtype=torch.float64)
    z = model[0](x[0])
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, a: tanh(a) + (a == z).all(1)[:, None])
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
    with torch.device("cpu"):
        read_network(small())


def test_shared_and_strided_parameters_are_read():
    generator, model = torch.Generator().manual_seed(1), small().double()
    model[0] = nn.Linear(4, 3).double()
    tied = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    model[0].weight.data = tied.data.T
    model[0].bias.data = torch.ones(1, dtype=torch.float64).expand(3)
    model = nn.Sequential(*model[:2], nn.Linear(3, 4).double(), nn.Tanh(), nn.Linear(4, 3).double())
    model[2].weight = model[4].weight = tied
    model[4].weight = nn.Parameter(tied.data.T)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(read_network(model, at=x).logits(x), model(x))


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
    with pytest.raises(ValueError, match="computes something else"):
        compare(model, wrong, (network.inputs,), model[1].weight, x)


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
