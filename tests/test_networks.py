"""Reading networks."""

import pytest
import torch
from conftest import SMOOTH, random_networks
from hypothesis import given
from torch import nn

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
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
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
    x = torch.randn(5, 4)
    logits = read_network(model).logits(x.double())
    torch.testing.assert_close(logits.float(), model(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "cannot certify the layer"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(4, 2)), "cannot certify the layer"),
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
    model = crc.mlp([6, 9, 7, 4], activation, seed=1) if layers == 5 else crc.mlp([6, 9, 4])
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
