"""Float64 evaluations are within the bounds that certificates subtract, judged in 80 digits."""

import mpmath
import pytest
import torch
from conftest import evaluate_exactly

import crcbook as crc
from crcbook.networks import read_network
from crcbook.proof.rounding import RoundingModel


@pytest.mark.parametrize("activation", ["softplus", "tanh", "gelu"])
@pytest.mark.parametrize("sizes", [[5, 8, 3], [4, 6, 5, 2]])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_errors_are_within_the_bounds_and_the_bounds_within_reason(activation, sizes, scale):
    model = crc.mlp(sizes, activation, seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    network = read_network(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, sizes[0], generator=generator, dtype=torch.float64)
    label, target = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    margin, gradient = network.margin_and_gradient(x, label, target)
    weights = network.margin_weights(label, target)
    offset = network.layers[-1].bias[label] - network.layers[-1].bias[target]
    value_error, slope_error = RoundingModel.of(network).errors(
        x.norm(dim=1), weights.norm(dim=1), offset.abs()
    )
    with mpmath.workdps(80):
        for i in range(6):
            exact_margin, exact_gradient = evaluate_exactly(network, x[i], 0, 1)
            assert abs(exact_margin - margin[i].item()) <= value_error[i].item()
            difference = exact_gradient - mpmath.matrix(gradient[i].tolist())
            assert mpmath.norm(difference) <= slope_error[i].item()
    size = max(1.0, scale) ** len(sizes)
    assert (value_error < 1e-11 * size).all() and (slope_error < 1e-11 * size).all()


def test_deviation_covers_torchs_softplus_and_is_zero_elsewhere():
    model = crc.mlp([3, 10, 2], "softplus", seed=0).double()
    with torch.no_grad():
        model[1].weight.mul_(30)
    network = read_network(model)
    x = torch.randn(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gap = (model(x).detach() - network.logits(x)) @ torch.tensor([1.0, -1.0]).double()
    weights = network.margin_weights(torch.tensor([0]), torch.tensor([1]))
    deviation = RoundingModel.of(network).deviation(weights)
    assert 1e-12 < gap.abs().max() <= deviation < 1e-7
    smooth = read_network(crc.mlp([3, 10, 2], "tanh"))
    assert RoundingModel.of(smooth).deviation(weights) == 0
