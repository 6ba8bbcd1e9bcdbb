"""What the public functions accept, checked once at the door."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from crcbook.networks import Network
from crcbook.proof.box import Box

SMALLEST_RADIUS, LARGEST = 1e-100, 1e100  # their squares are float64 numbers


def readable(x: object) -> Tensor | None:
    """Inputs that may say what shape a model takes; None for what :func:`as_inputs` will refuse.

    Args:
        x: anything.

    Returns:
        The inputs, or None.
    """
    if isinstance(x, Tensor) and x.dim() > 1 and len(x) > 0 and x.is_floating_point():
        return x.detach()
    return None


def as_inputs(x: object, network: Network) -> Tensor:
    """Check inputs and flatten them.

    Args:
        x: ``(batch, *input_shape)``, real and finite.
        network: the network they are for.

    Returns:
        ``(batch, n)`` float64 on the network's device.

    Raises:
        TypeError: where ``x`` is no floating-point tensor.
        ValueError: for an empty batch, a wrong shape, NaN or infinity.
    """
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor; got {kind}")
    if x.dim() < 2 or len(x) == 0 or x[0].numel() != network.inputs:
        raise ValueError(
            f"x must be (batch, *input_shape) with at least one item and {network.inputs} values "
            f"an item; got {tuple(x.shape)}"
        )
    if not x.isfinite().all():
        raise ValueError(f"x must be finite; {int((~x.isfinite()).sum())} of its values are not")
    return x.detach().flatten(1).to(network.device, torch.float64)


def as_classes(
    name: str, classes: int | Sequence[int] | Tensor, network: Network, batch: int | None = None
) -> Tensor:
    """Check class indices.

    Args:
        name: the argument's name, for the message.
        classes: an integer, or a tensor of them.
        network: the network they are for.
        batch: the length they must have; None for any.

    Returns:
        int64 classes on the network's device.

    Raises:
        TypeError: for anything but integers.
        ValueError: for a wrong shape or a class the model lacks.
    """
    try:
        classes = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must hold integers; got {classes!r}") from error
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers; got {classes.dtype}")
    classes = classes.to(torch.int64)  # few dtypes of integers can be compared
    if batch is not None and tuple(classes.shape) != (batch,):
        raise ValueError(
            f"{name} must be ({batch},), one class an item; got {tuple(classes.shape)}"
        )
    if classes.numel() and not ((classes >= 0) & (classes < network.classes)).all():
        raise ValueError(
            f"{name} must be in 0..{network.classes - 1}; got values from {int(classes.min())} "
            f"to {int(classes.max())}"
        )
    return classes.to(network.device)


def as_box(box: tuple | None, x: Tensor) -> Box | None:
    """Check a box and that it holds the inputs.

    Args:
        box: the lowest and the highest valid value, numbers or tensors of an input's shape; None
            for no box.
        x: ``(batch, n)`` float64 inputs, already checked.

    Returns:
        The box, or None.

    Raises:
        TypeError: where the box is no pair of numbers or tensors.
        ValueError: where an end has another shape or is NaN, the ends are not in order, or an
            input lies outside.
    """
    if box is None:
        return None
    try:
        lower, upper = (
            torch.as_tensor(end, dtype=x.dtype, device=x.device).detach().flatten() for end in box
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"box must be a pair (lowest, highest); got {box!r}") from error
    for end in (lower, upper):
        if end.numel() not in (1, x.shape[1]) or end.isnan().any():
            raise ValueError(
                f"an end of the box must be one number or {x.shape[1]}, and not NaN; "
                f"got {end.numel()} values"
            )
    if not (lower <= upper).all():
        raise ValueError(f"the box must have lowest <= highest; got {box!r}")
    outside = ((x < lower) | (x > upper)).any(1)
    if outside.any():
        raise ValueError(
            f"the box must hold every input; {int(outside.sum())} of {len(x)} lie outside, "
            f"with values from {x.min():g} to {x.max():g}"
        )
    return Box(lower.expand(x.shape[1]), upper.expand(x.shape[1]))


def as_radius(radius: float | Tensor) -> float:
    """Check a radius.

    Args:
        radius: an l2 distance.

    Returns:
        The radius.

    Raises:
        TypeError: where it is no real number.
        ValueError: where it is not between 1e-100 and 1e100: beyond, squares leave float64.
    """
    try:
        value = float(radius)
    except (TypeError, ValueError) as error:
        raise TypeError(f"radius must be a real number; got {type(radius).__name__}") from error
    if not 0 < value < math.inf:
        raise ValueError(f"radius must be positive and finite; got {value:g}")
    if not SMALLEST_RADIUS <= value <= LARGEST:
        raise ValueError(f"radius must be from {SMALLEST_RADIUS:g} to {LARGEST:g}; got {value:g}")
    return value
