"""Steps with gradients about the mean of each layer's inputs (Montavon & Müller 2012)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crcbook.networks import Network, submodules
from crcbook.training.losses import trained_layers

_ITEMS = 1000  # whose mean is taken


def mean_inputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The means of what each layer but the first one gets.

    Args:
        model: an :func:`crcbook.mlp`.
        x: ``(items, n)``, of which the first are looked at.

    Returns:
        ``(width,)`` a hidden layer.
    """
    layers = trained_layers(model, x.dtype)
    values = Network(tuple(layers)).preactivations(x[:_ITEMS])
    return [
        layer.activation.value(z).mean(0) for layer, z in zip(layers, values, strict=False)
    ]  # fmt: skip


def centred_step(
    optimizer: torch.optim.Optimizer, model: nn.Sequential, centres: Sequence[Tensor]
) -> None:
    """Let an optimizer move the weights as if the layers' inputs had mean 0.

    Args:
        optimizer: of the model's parameters, which have their gradients.
        model: the network.
        centres: what :func:`mean_inputs` returned; none for a step as it is.
    """
    linears = [module for module in submodules(model) if isinstance(module, nn.Linear)]
    centred = []
    for linear, centre in zip(linears[1:], centres, strict=False):
        weight, bias = linear.weight, linear.bias
        if bias is not None and bias.grad is not None and weight.grad is not None:
            weight.grad.sub_(torch.outer(bias.grad, centre))
            centred.append((weight, bias, centre, weight.detach().clone()))
    optimizer.step()
    with torch.no_grad():  # what a layer answers to the mean moves as its bias was to
        for weight, bias, centre, before in centred:
            bias.sub_((weight - before) @ centre)
