r"""The exact Hessian of a margin at given points: what the curvature bounds are held against.

With :math:`B_I = \partial z^{(I)}/\partial x` and :math:`F_I = \partial f/\partial a^{(I)}`, it is
(Singla & Feizi 2020, Theorem 3)

.. math:: \nabla^2 f = \sum_{I=1}^{L-1} B_I^T \mathrm{diag}(F_I \odot \sigma''(z^{(I)})) B_I .

Evaluated in float64; nothing here is rounded outward, and no certificate uses it.
"""

import torch
from torch import Tensor, nn

from crcbook.checks import as_classes
from crcbook.networks import read_network


def hessian_terms(model: nn.Sequential, x: Tensor, label: int, target: int) -> list[Tensor]:
    r"""The terms of the Hessian of :math:`f = z_y - z_t`, one a hidden layer.

    Args:
        model: a Sequential that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` points; the result is differentiable in them.
        label: the class y.
        target: the class t.

    Returns:
        A tensor ``(batch, n, n)`` float64 a hidden layer, the first layer's term first.

    Raises:
        ValueError: for a class the model lacks.
    """
    network = read_network(model)
    label, target = as_classes("label", label, network), as_classes("target", target, network)
    x = x.flatten(1).to(network.device, torch.float64)
    values = network.preactivations(x)
    hidden = list(zip(network.layers[:-1], values, strict=True))
    jacobians = []  # B_I, (batch, width, n)
    carried = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)  # of a^(I-1)
    for layer, z in hidden:
        jacobians.append((layer.weight @ carried).expand(len(x), -1, -1))
        carried = layer.activation.slope(z)[..., None] * jacobians[-1]
    weights = network.layers[-1].weight[label] - network.layers[-1].weight[target]
    influence = weights.expand(len(x), -1)  # F_I, (batch, width)
    terms = []
    for (layer, z), jacobian in zip(reversed(hidden), reversed(jacobians), strict=True):
        diagonal = influence * layer.activation.bend(z)
        terms.append(jacobian.mT @ (diagonal[..., None] * jacobian))
        influence = (influence * layer.activation.slope(z)) @ layer.weight
    return terms[::-1]


def margin_hessian(model: nn.Sequential, x: Tensor, label: int, target: int) -> Tensor:
    r"""The Hessian of :math:`f = z_y - z_t`.

    Args:
        model: a Sequential that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` points; the result is differentiable in them.
        label: the class y.
        target: the class t.

    Returns:
        ``(batch, n, n)`` float64; zero for a linear network.

    Raises:
        ValueError: for a class the model lacks.
    """
    terms = hessian_terms(model, x, label, target)
    if terms:
        return sum(terms[1:], terms[0])
    network = read_network(model)
    zero = torch.zeros(len(x), network.inputs, network.inputs, dtype=torch.float64)
    return zero.to(network.device)
