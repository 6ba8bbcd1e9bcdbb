"""The public bounds of a margin's curvature."""

import torch
from torch import Tensor, nn

from crcbook.checks import as_box, as_classes, as_inputs, as_radius, as_tensor
from crcbook.networks import read_network
from crcbook.proof.curvature import downward_curvature, local_curvature
from crcbook.proof.intervals import Region
from crcbook.proof.rounding import RoundingModel


def curvature_bounds(
    model: nn.Module,
    label: int | Tensor,
    target: int | Tensor,
    x: Tensor | None = None,
    radius: float | None = None,
    box: tuple | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Proved bounds m and M of the Hessian's eigenvalues of a margin :math:`f = z_y - z_t`.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts.
        label: a class y, or ``(pairs,)`` of them.
        target: a class t, or ``(pairs,)`` of them.
        x: ``(pairs, *input_shape)`` centres of balls to bound the eigenvalues in; None for all of
            R^n. A single input, label or target serves all pairs.
        radius: the balls' l2 radius; needed with ``x``.
        box: the valid inputs, as in :func:`crcbook.certify`; only with ``x``.

    Returns:
        ``m <= 0 <= M``, each ``(pairs,)`` float64.

    Raises:
        TypeError: where the model is no module or a class is no integer.
        ValueError: for a class out of range or a wrong shape, a network that cannot be certified,
            or one of ``x`` and ``radius`` without the other.
    """
    x = None if x is None else as_tensor(x)
    network = read_network(model, x)
    label, target = as_classes("label", label, network), as_classes("target", target, network)
    if label.ndim > 1 or target.ndim > 1:
        raise ValueError(
            f"label and target must be a class or (pairs,) of them; got {tuple(label.shape)} and "
            f"{tuple(target.shape)}"
        )
    label, target = label.reshape(-1), target.reshape(-1)
    if (x is None) != (radius is None) or (x is None and box is not None):
        raise ValueError("a region needs both x and radius; a box needs them too")
    lengths = {len(label), len(target), 1 if x is None else len(x)} - {1}
    if len(lengths) > 1:
        raise ValueError(
            f"label, target and x must have one length, or 1; got {len(label)}, {len(target)}"
            + ("" if x is None else f" and {len(x)}")
        )
    if x is None or radius is None:
        label, target = torch.broadcast_tensors(label, target)
        up = downward_curvature(network, target, label)
        return -downward_curvature(network, label, target), up
    x0, radius = as_inputs(x, network), as_radius(radius)
    pairs = max(len(x0), len(label), len(target))
    x0, label, target = x0.expand(pairs, -1), label.expand(pairs), target.expand(pairs)
    limits = as_box(box, x0)
    allowed = None if limits is None else limits.around(x0)
    radii, item = torch.full_like(x0[:, 0], radius), torch.arange(pairs, device=x0.device)
    rounding = RoundingModel.of(network)
    down, up = (
        local_curvature(rounding, Region(x0, radii, allowed), item, *pair, solve="entries")
        for pair in ((label, target), (target, label))
    )
    return -down, up
