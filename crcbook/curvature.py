r"""Bounds of a margin's curvature: m and M with :math:`mI \preceq \nabla^2 f(x) \preceq MI`.

For a network with one hidden layer, :math:`\nabla^2 f(x) = W_1^T \mathrm{diag}(w \odot
\sigma''(z)) W_1` with :math:`w = W_2[y] - W_2[t]`. Replacing each diagonal entry by the smallest
(largest) value it can take gives a constant matrix below (above) every Hessian in the Loewner
order, and its extreme eigenvalue is m (M) (Singla & Feizi 2020, section 5).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from crcbook.activations import ROUNDING
from crcbook.checks import as_classes
from crcbook.networks import Network, read_network
from crcbook.spectral import scaled_norm_bound

_CACHE: OrderedDict[tuple[str, torch.device], Tensor] = OrderedDict()
_CACHED_NETWORKS = 16


def curvature_bounds(model: nn.Sequential, label, target) -> tuple[Tensor, Tensor]:
    r"""Proved bounds m and M of the Hessian's eigenvalues of a margin, over all of R^n.

    Args:
        model: a network with at most one hidden layer.
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
        table[missing[0], missing[1]] = _downward_curvature(network, *missing)
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


def _downward_curvature(network: Network, label: Tensor, target: Tensor) -> Tensor:
    if len(network.layers) == 1:
        return torch.zeros(len(label), dtype=torch.float64, device=network.device)
    if len(network.layers) > 2:
        raise ValueError(
            "curvature is bounded for networks with at most one hidden layer so far; "
            f"got {len(network.layers) - 1} hidden layers"
        )
    hidden = network.layers[0]
    lowest, highest = hidden.activation.bend_range
    weights = network.margin_weights(label, target)
    depth = -torch.minimum(weights * lowest, weights * highest).clamp(max=0)
    return scaled_norm_bound(hidden.weight, depth.sqrt()) ** 2 * (1 + ROUNDING)
