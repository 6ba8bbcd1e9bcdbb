r"""Bounds of a margin's curvature: m and M with :math:`mI \preceq \nabla^2 f(x) \preceq MI`.

With :math:`B_I = \partial z^{(I)}/\partial x` and :math:`F_I = \partial f/\partial a^{(I)}`, the
Hessian of a margin is (Singla & Feizi 2020, Theorem 3)

.. math:: \nabla^2 f = \sum_{I=1}^{L-1} B_I^T \mathrm{diag}(F_I \odot \sigma''(z^{(I)})) B_I .

Replacing each diagonal entry by the smallest value it can take, :math:`-d_j` where that is
negative, bounds :math:`-m` by :math:`\sum_I \|\mathrm{diag}(\sqrt{d}) B_I\|^2`. In the first layer
:math:`B_1 = W_1`, so that with one hidden layer m is the extreme eigenvalue of a constant matrix.
Further in, the slopes between the layers vary, :math:`\sigma' = c + re` with :math:`|e| \le 1`, and

.. math:: \|\mathrm{diag}(\sqrt d) W_I \mathrm{diag}(\sigma') B_{I-1}\| \le
   c\,\|\mathrm{diag}(\sqrt d) W_I B_{I-1}\| + r\,\|\mathrm{diag}(\sqrt d) W_I\| \|B_{I-1}\|,

applied again to the first term until the input is reached: up to twice tighter a layer than the
product of norms.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crcbook.arithmetic import OUTWARD, gamma
from crcbook.checks import as_classes
from crcbook.networks import Layer, Network, read_network
from crcbook.spectral import scaled_norm_bound

_CACHE: OrderedDict[tuple[str, torch.device], Tensor] = OrderedDict()
_CACHED_NETWORKS = 16


def curvature_bounds(model: nn.Sequential, label, target) -> tuple[Tensor, Tensor]:
    r"""Proved bounds m and M of the Hessian's eigenvalues of a margin, over all of R^n.

    Args:
        model: a Sequential that :func:`crcbook.networks.read_network` accepts.
        label: a class y, or ``(pairs,)`` of them.
        target: a class t, or ``(pairs,)`` of them.

    Returns:
        ``m <= 0 <= M``, each ``(pairs,)`` float64, for the margin :math:`f = z_y - z_t`.

    Raises:
        TypeError: where the model is no Sequential or a class is no integer.
        ValueError: for a class out of range or a network that cannot be certified.
    """
    network = read_network(model)
    label = as_classes("label", label, network).reshape(-1)
    target = as_classes("target", target, network).reshape(-1)
    label, target = torch.broadcast_tensors(label, target)
    return -downward_curvature(network, label, target), downward_curvature(network, target, label)


def downward_curvature(network: Network, label: Tensor, target: Tensor) -> Tensor:
    r"""Proved bounds of :math:`|m| = -m`: how fast a margin can bend towards the boundary.

    Since :math:`z_t - z_y = -f`, the upper bound M of a pair (y, t) is :math:`|m|` of (t, y). Each
    pair is computed once a network and remembered under the hash of its weights.

    Args:
        network: the float64 network.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.

    Returns:
        ``(pairs,)`` float64, at least 0.
    """
    table = _table(network)
    pairs = torch.unique(torch.stack([label, target]), dim=1)
    missing = pairs[:, table[pairs[0], pairs[1]].isnan()]
    if missing.shape[1]:
        weights = network.margin_weights(*missing)
        table[missing[0], missing[1]] = curvature_sum(network.layers, weights, _proved_norm)
    return table[label, target]


def _table(network: Network) -> Tensor:
    key = (network.key, network.device)
    if key not in _CACHE:
        size = (network.classes, network.classes)
        _CACHE[key] = torch.full(size, torch.nan, dtype=torch.float64, device=network.device)
    _CACHE.move_to_end(key)
    while len(_CACHE) > _CACHED_NETWORKS:
        _CACHE.popitem(last=False)
    return _CACHE[key]


@dataclass(frozen=True)
class Link:
    """A factor of a Jacobian's bound.

    Attributes:
        matrix: ``(width, ...)``, a product of weights.
        error: a bound of the spectral norm of the matrix's rounding error.
        factor: what its norm counts, a float or a scalar tensor.
    """

    matrix: Tensor
    error: float
    factor: float | Tensor


Norm = Callable[[tuple[int, int], Link, Tensor], Tensor]


def curvature_sum(layers: Sequence[Layer], weights: Tensor, norm: Norm) -> Tensor:
    r"""The bound of :math:`|m|` of this module's formula, for several margins.

    One formula serves the proof and the training: only ``norm`` differs.

    Args:
        layers: the network's layers.
        weights: ``(pairs, width)`` last-layer rows of the margins.
        norm: called with the link's place, the link and ``(pairs, width)`` scales d, it returns
            ``(pairs,)`` values of :math:`\|\mathrm{diag}(\sqrt d) M\|`.

    Returns:
        ``(pairs,)``, at least 0.
    """
    total = weights.new_zeros(len(weights))
    depths = _depths(layers, weights)
    whole = [layers[0].weight.new_ones(1, len(layer.bias)) for layer in layers[:-1]]
    links: list[Link] = []
    reach: float | Tensor = 0.0  # of the previous Jacobian's norm
    for place in range(len(layers) - 1):
        steepest = 0.0 if place == 0 else layers[place - 1].activation.max_slope
        links = _extend(links, layers, place, reach)
        total = total + _chain_norm(links, place, depths[place], norm, steepest * reach) ** 2
        if place < len(layers) - 2:
            # Keys from -1 downward: the same chains without a margin's scales.
            reach = _chain_norm(links, -1 - place, whole[place], norm, steepest * reach)[0]
    return total * OUTWARD


def _extend(links: list[Link], layers: Sequence[Layer], place: int, reach) -> list[Link]:
    """The links of the next Jacobian: those before, carried through, and a new one."""
    weight = layers[place].weight
    if place == 0:
        return [Link(weight, 0.0, 1.0)]
    lowest, highest = layers[place - 1].activation.slope_range
    centre, spread = (lowest + highest) / 2, (highest - lowest) / 2 * OUTWARD
    carried = [_carry(weight, centre, link) for link in links]
    return [*carried, Link(weight, 0.0, spread * reach)]


def _carry(weight: Tensor, centre: float, link: Link) -> Link:
    size = float(weight.detach().norm()) * abs(centre) * OUTWARD
    terms = gamma(weight.shape[1] + 4)
    error = size * (link.error + terms * (float(link.matrix.detach().norm()) + link.error))
    return Link(centre * (weight @ link.matrix), error * OUTWARD, link.factor)


def _chain_norm(links: list[Link], place: int, scales: Tensor, norm: Norm, product) -> Tensor:
    """The sum over the links, or the product of norms where that is smaller."""
    norms = [norm((place, index), link, scales) for index, link in enumerate(links)]
    total = sum(link.factor * value for link, value in zip(links, norms, strict=True))
    if len(links) == 1:
        return total
    return torch.minimum(total, product * norms[-1]) * OUTWARD


def _depths(layers: Sequence[Layer], weights: Tensor) -> list[Tensor]:
    r"""The most each unit can bend a margin down, :math:`d = \max(0, -\min F\sigma'')`.

    The interval of :math:`F_I` is carried backwards with its signs, :math:`F_{I-1} =
    W_I^T(\sigma' \odot F_I)`, and rounded outward by the error of the product.
    """
    low = high = weights
    depths = []
    for layer in reversed(layers[:-1]):
        row = layer.activation
        lowest, _ = _product_interval(low, high, *row.bend_range)
        depths.append(-lowest.clamp(max=0) * OUTWARD)
        low, high = _product_interval(low, high, *row.slope_range)
        positive, negative = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        size = torch.maximum(low.abs(), high.abs()).detach() @ layer.weight.detach().abs()
        error = 2 * gamma(2 * layer.weight.shape[0] + 4) * size
        low, high = (
            low @ positive + high @ negative - error,
            high @ positive + low @ negative + error,
        )
    return depths[::-1]


def _product_interval(low: Tensor, high: Tensor, lower: float, upper: float):
    """The range of a product of a factor in [low, high] and one in [lower, upper]."""
    ends = (low * lower, low * upper, high * lower, high * upper)
    smallest = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
    largest = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
    return smallest, largest


def _proved_norm(_: tuple[int, int], link: Link, scales: Tensor) -> Tensor:
    largest = scales.amax(1).sqrt()
    return (scaled_norm_bound(link.matrix, scales.sqrt()) + link.error * largest) * OUTWARD
