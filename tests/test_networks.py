"""Reading networks."""

import pytest
import torch
from conftest import SMOOTH, random_networks
from hypothesis import given
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

import crcbook as crc
from crcbook.networks import deepen, read_network


@given(random_networks())
def test_margin_and_gradient_match_autograd(case):
    model, generator = case
    network = read_network(model)
    x = torch.randn(5, network.inputs, generator=generator, dtype=torch.float64)
    label, target = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    margin, gradient = network.margin_and_gradient(x, label, target)
    point = x.clone().requires_grad_()
    logits = model(point)
    expected = logits[:, 0] - logits[:, 1]
    (slope,) = torch.autograd.grad(expected.sum(), point)
    torch.testing.assert_close(margin, expected.detach())
    torch.testing.assert_close(gradient, slope)
    torch.testing.assert_close(network.logits(x), logits.detach())


def test_gradient_of_a_deep_network_matches_autograd():
    model = crc.mlp([3, 5, 7, 4, 3], "tanh", seed=1).double()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    label, target = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    _, gradient = read_network(model).margin_and_gradient(x.detach(), label, target)
    logits = model(x)
    picked = logits.gather(1, label[:, None]) - logits.gather(1, target[:, None])
    torch.testing.assert_close(gradient, torch.autograd.grad(picked.sum(), x)[0])


def test_mlp_is_reproducible_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = crc.mlp([4, 8, 3], seed=3)
    assert torch.equal(torch.rand(1), expected)
    second = crc.mlp([4, 8, 3], seed=3)
    assert torch.equal(first[1].weight, second[1].weight)
    assert not torch.equal(first[1].weight, crc.mlp([4, 8, 3], seed=4)[1].weight)
    assert first(torch.zeros(2, 1, 2, 2)).shape == (2, 3)


@pytest.mark.parametrize("sizes", [[4], [4, 0, 2], [4, 8, 1], []])
def test_mlp_refuses_impossible_widths(sizes):
    with pytest.raises(ValueError, match="sizes must be"):
        crc.mlp(sizes)


def test_an_edited_model_is_another_network():
    model = crc.mlp([4, 8, 3])
    before = read_network(model).key
    assert read_network(model).key == before
    with torch.no_grad():
        model[1].weight.view(-1)[0] += 1e-3
    assert read_network(model).key != before


def test_nested_and_bias_free_models_are_read():
    inner = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh())
    model = nn.Sequential(inner, nn.Identity(), nn.Linear(6, 3, bias=False))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits = read_network(model).logits(x.double())
    torch.testing.assert_close(logits.float(), model(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "cannot certify the layer"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(4, 2)), "cannot certify the layer"),
        (nn.Sequential(nn.Linear(4, 2), nn.Dropout()), "acts in training alone"),
        (nn.Sequential(nn.Linear(4, 2), nn.LogSoftmax(1)), "does not change which class wins"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), "fold it into the Linear layer"),
        (nn.Sequential(spectral_norm(nn.Linear(4, 2))), "remove its parametrizations"),
        (nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), "expected a Linear layer before"),
        (nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Tanh()), "expected a Linear layer before"),
        (nn.Sequential(nn.Linear(4, 2), nn.Softplus()), "must end in a Linear layer"),
        (nn.Sequential(), "must end in a Linear layer"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(4, 2)), "Flatten must"),
        (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(4, 2)), "follows one"),
        (nn.Sequential(nn.Linear(4, 1)), "at least two classes"),
        (nn.Sequential(nn.Linear(4, 3), nn.Softplus(threshold=5), nn.Linear(3, 2)), "threshold"),
    ],
)
def test_models_without_a_certificate_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        read_network(model)


class Scaled(nn.Sequential):
    """A Sequential that does something before its layers."""

    def forward(self, x):
        return super().forward(10 * x)


class Named(nn.Sequential):
    """A Sequential that only has another constructor."""

    def __init__(self):
        super().__init__(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def pruned():
    model = Named()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


def with_hook():
    model = Named()
    model.register_forward_pre_hook(lambda module, inputs: (10 * inputs[0],))
    return model


class Called(nn.Sequential):
    """A Sequential that does something after its layers."""

    def __call__(self, x):
        return -super().__call__(x)


def with_own_forward():
    model = Named()
    model[0].forward = lambda x: 10 * x[:, :3]
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Scaled(*Named()), "forward is not that of its layers"),
        (nn.Sequential(Scaled(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)), "forward is not that"),
        (with_own_forward(), "forward is not that"),
        (Called(*Named()), "forward is not that"),
        (with_hook(), "forward hooks"),
        (pruned(), "forward hooks"),
    ],
)
def test_models_that_compute_something_else_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        read_network(model)


def test_hooks_of_all_modules_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: -output)
    try:
        with pytest.raises(ValueError, match="forward hooks"):
            read_network(Named())
    finally:
        handle.remove()
    read_network(Named())


def test_a_sequential_with_its_own_constructor_is_read():
    model, x = Named(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(read_network(model).logits(x.double()).float(), model(x))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1e-51,), "a size from 1e-50 to 1e\\+50"),
        ((1e51,), "a size from 1e-50 to 1e\\+50"),
        ((1e-40, 1e-40, 1e-40), "product from 1e-100 to 1e\\+100"),
        ((1e40, 1e40, 1e40), "product from 1e-100 to 1e\\+100"),
    ],
)
def test_weights_out_of_all_proportion_are_refused(weights, message):
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False).double() for _ in weights))
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data = weight * torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        read_network(model)


def test_a_network_read_before_an_edit_keeps_its_weights():
    model = crc.mlp([4, 8, 3]).double()
    network = read_network(model)
    before = [(layer.weight.clone(), layer.bias.clone()) for layer in network.layers]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    for layer, (weight, bias) in zip(network.layers, before, strict=True):
        assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


def test_half_precision_contexts_are_refused():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        read_network(crc.mlp([4, 8, 3]))


def test_weights_must_be_finite_and_the_model_a_sequential():
    model = crc.mlp([4, 8, 3])
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite weights"):
        read_network(model)
    with pytest.raises(TypeError, match="Sequential"):
        read_network(nn.Linear(4, 2))


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("layers", [3, 5])
def test_a_deepened_network_computes_almost_the_same(activation, layers):
    model = crc.mlp([6, 9, 7, 4] if layers == 5 else [6, 9, 4], activation, seed=1)
    deeper = deepen(model, layers)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    assert len(read_network(deeper).layers) == layers
    torch.testing.assert_close(deeper(x), model(x), rtol=0, atol=0.02)


def test_only_networks_with_a_hidden_layer_can_be_deepened():
    with pytest.raises(ValueError, match="cannot make 3 layers of a network with 1"):
        deepen(crc.mlp([6, 4]), 3)
    with pytest.raises(ValueError, match="cannot make 1 layers of a network with 2"):
        deepen(crc.mlp([6, 5, 4]), 1)
    with pytest.raises(ValueError, match=r"crcbook\.mlp builds"):
        deepen(torch.nn.Sequential(torch.nn.Linear(3, 2)), 3)
