"""Reading networks."""

import pytest
import torch
from conftest import EVERY, SMOOTH, random_networks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import crcbook as crc
from crcbook.networks import Layer, Network, deepen, mean_of, nearly_linear, read_network
from crcbook.proof.rounding import reading_bounds


@given(random_networks(activations=EVERY))
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
    ("weights", "message"),
    [
        ((1e-51,), "a size from 1e-50 to 1e\\+50"),
        ((1e51,), "a size from 1e-50 to 1e\\+50"),
        ((1e-40, 1e-40, 1e-40), "product from 1e-100 to 1e\\+100"),
        ((1e40, 1e40, 1e40), "product from 1e-100 to 1e\\+100"),
    ],
)
def test_weights_out_of_all_proportion_are_refused(weights, message):
    linears = [nn.Linear(2, 2, bias=False).double() for _ in weights]
    model = nn.Sequential(*(module for linear in linears for module in (nn.Tanh(), linear)))
    for layer, weight in zip(linears, weights, strict=True):
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


def test_weights_must_be_finite():
    model = crc.mlp([4, 8, 3])
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            model[1].weight[0, 0] = bad
        with pytest.raises(ValueError, match="finite weights"):
            read_network(model)


@given(
    random_networks(activations=["softplus", "tanh", "silu"]),
    st.sampled_from([1e-9, 1e-3, 0.3]),
    st.sampled_from([0.0, 1.0, 30.0]),
)
def test_margins_differ_by_no_more_than_the_layers_are_off(case, size, length):
    """Weights moved by so much, and margins by no more than what that is said to do."""
    model, generator = case
    network = read_network(model)
    layers, moved = [], []
    for layer in network.layers:
        weight, bias = (
            size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            for tensor in (layer.weight, layer.bias)
        )
        off = float(torch.linalg.matrix_norm(weight, 2)), float(bias.norm())
        layers.append(Layer(layer.weight, layer.bias, layer.activation, *off))
        moved.append(Layer(layer.weight + weight, layer.bias + bias, layer.activation))
    norms = [float(torch.linalg.matrix_norm(layer.weight, 2)) for layer in layers[:-1]]
    x = length * torch.randn(20, network.inputs, generator=generator, dtype=torch.float64)
    gap = Network(tuple(moved)).logits(x) - network.logits(x)
    gap = gap.amax(1) - gap.amin(1)  # of the worst pair of classes
    rounding = 1e-12 * (1 + network.logits(x).abs().amax(1))
    alpha, beta = reading_bounds(Network(tuple(layers)), norms)
    assert (gap <= alpha * x.norm(dim=1) + beta + rounding).all()
    assert reading_bounds(network, norms) == (0.0, 0.0)


def test_what_layers_are_off_by_is_not_said_to_do_much_more():
    """One hidden layer without bias, its weight off in the one direction that counts."""
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    tanh, identity = crc.ACTIVATIONS["tanh"], read_network(crc.mlp([2, 2])).layers[0].activation
    last = Layer(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), zero, identity)
    network = Network((Layer(weight, zero, tanh, 1e-3, 1e-4), last))
    alpha, beta = reading_bounds(network, [2.0])
    assert alpha == pytest.approx(2e-3, rel=1e-5) and beta == pytest.approx(2e-4, rel=1e-5)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("layers", [3, 5])
def test_a_deepened_network_computes_almost_the_same(activation, layers):
    model = crc.mlp([6, 9, 7, 4] if layers == 5 else [6, 9, 4], activation, seed=1)
    deeper = deepen(model, layers)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    assert len(read_network(deeper).layers) == layers
    torch.testing.assert_close(deeper(x), model(x), rtol=0, atol=0.02)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("widths", [([9], [7], [4]), ([9, 3], [7, 5])])
def test_the_mean_of_networks_computes_the_mean_of_their_logits(activation, widths):
    models = [crc.mlp([6, *hidden, 4], activation, seed=i) for i, hidden in enumerate(widths)]
    wide = mean_of(models)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([model(x) for model in models]).mean(0)
    torch.testing.assert_close(wide(x), expected)
    if len(widths[0]) == 1:  # with more layers the bound is no longer the Hessian's own
        bends = [crc.curvature_bounds(model, 0, 1) for model in models]
        least, most = crc.curvature_bounds(wide, 0, 1)
        assert least >= (1 + 1e-9) * sum(m for m, _ in bends) / len(bends)
        assert most <= (1 + 1e-9) * sum(m for _, m in bends) / len(bends)


def test_only_networks_that_go_together_have_a_mean():
    model = crc.mlp([6, 5, 4])
    others = [crc.mlp([6, 5, 4], "tanh")]
    others += [crc.mlp(sizes) for sizes in ([7, 5, 4], [6, 5, 3], [6, 5, 5, 4])]
    for other in others:
        with pytest.raises(ValueError, match="the same inputs, classes, activation"):
            mean_of([model, other])
    for models in ([], [crc.mlp([6, 4])]):
        with pytest.raises(ValueError, match="with a hidden layer"):
            mean_of(models)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("widths", [[9, 7], [9, 8, 5]])
def test_a_nearly_linear_start_is_drawn_anew_and_its_late_layers_hardly_bend(activation, widths):
    model = crc.mlp([6, *widths, 4], activation, seed=3)
    start, other = nearly_linear(model), nearly_linear(model, seed=1)
    assert repr(start) == repr(model)
    first, *late, _ = read_network(start).layers
    x = torch.rand(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = first.activation.value(x @ first.weight.T + first.bias)
    for layer in late:  # all directions are stretched alike, and slopes vary by less than half
        stretch = torch.linalg.svdvals(layer.weight)
        torch.testing.assert_close(stretch, torch.full_like(stretch, stretch[0].item()))
        z = x @ layer.weight.T + layer.bias
        slope = layer.activation.slope(z)
        assert slope.amin() > 0.5 * slope.amax()
        x = layer.activation.value(z)
    assert not torch.equal(next(start.parameters()), next(other.parameters()))
    with pytest.raises(ValueError, match="two hidden layers"):
        nearly_linear(crc.mlp([6, 5, 4]))


def test_only_networks_with_a_hidden_layer_can_be_deepened():
    with pytest.raises(ValueError, match="cannot make 3 layers of a network with 1"):
        deepen(crc.mlp([6, 4]), 3)
    with pytest.raises(ValueError, match="cannot make 1 layers of a network with 2"):
        deepen(crc.mlp([6, 5, 4]), 1)
    with pytest.raises(ValueError, match=r"crcbook\.mlp builds"):
        deepen(torch.nn.Sequential(torch.nn.Linear(3, 2)), 3)
