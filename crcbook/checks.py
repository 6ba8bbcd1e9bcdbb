"""What the public functions accept, checked once at the door."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from crcbook.networks import Network, read_network
from crcbook.proof.box import Box

SMALLEST_RADIUS, LARGEST = 1e-100, 1e100  # their squares are float64 numbers
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of an end of a box, in roundings of the inputs' precision: a standardised pixel, (p - m) / s, and
# the same end worked out elsewhere differ by so many.
_BESIDE = 4


class Classifier(Protocol):
    """What labels are checked against."""

    @property
    def classes(self) -> int:
        """How many there are."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def logits(self, x: Tensor) -> Tensor:
        """The ``(batch, classes)`` logits of ``(batch, n)`` inputs.

        Args:
            x: ``(batch, n)``.

        Returns:
            ``(batch, classes)``.
        """


@dataclass(frozen=True)
class Items:
    """Checked inputs, and what they looked like.

    Attributes:
        x: ``(batch, n)`` float64, on the model's device.
        shape: ``(batch, *input_shape)``, as given; of one item without a batch dimension, 1 first.
        dtype: their precision, as given.
    """

    x: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def __len__(self) -> int:
        """How many there are."""
        return len(self.x)

    def like(self, point: Tensor) -> Tensor:
        """Points as the inputs were given.

        Args:
            point: ``(batch, n)`` float64.

        Returns:
            ``(batch, *input_shape)`` in the inputs' precision.
        """
        return point.to(self.dtype).reshape(self.shape)


def as_tensor(x: Any) -> Tensor:
    """Check that inputs are a plain tensor of numbers, or an array that can be one.

    Args:
        x: anything.

    Returns:
        The tensor, without gradients.

    Raises:
        TypeError: for another thing than a dense tensor or array of floating-point numbers.
        ValueError: for an empty one, or numbers that are not finite.
    """
    if isinstance(x, np.ndarray):
        if x.dtype.kind != "f" or x.dtype.itemsize > 8:
            raise TypeError(f"x must hold floating-point numbers; got {x.dtype}{_remedy(x.dtype)}")
        x = torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x must be a floating-point tensor or NumPy array; got {type(x).__name__}{_part_of(x)}"
        )
    if type(x) not in (Tensor, nn.Parameter) or x.is_nested:
        raise TypeError(f"x must be a plain torch.Tensor; got {type(x).__name__}: give its numbers")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor; got {x.layout}: call x.to_dense()")
    if x.dtype not in DTYPES:
        raise TypeError(
            "x must be a floating-point tensor of float16, bfloat16, float32 or float64; got "
            f"{x.dtype}{_remedy(x.dtype)}"
        )
    if x.is_meta:
        raise TypeError("x must hold numbers; got a tensor on the device meta, which has none")
    if x.numel() == 0 or x.dim() == 0:
        raise ValueError(
            f"x must be (batch, *input_shape) with at least one item; got {tuple(x.shape)}"
        )
    x = x.detach()
    if not x.isfinite().all():
        raise ValueError(f"x must be finite; {int((~x.isfinite()).sum())} of its values are not")
    return x


def _remedy(dtype: object) -> str:
    name = str(dtype).removeprefix("torch.")
    if name == "uint8":
        return ": pixels from 0 to 255 are given as x / 255, if the model was trained so"
    return ": give its real part" if name.startswith("complex") else ": convert it to float32"


def _part_of(x: Any) -> str:
    if hasattr(x, "train") and hasattr(x, "test"):
        return ": give the items of a part of it, as in data.test.x and data.test.y"
    if hasattr(x, "x") and hasattr(x, "y"):
        return ": give its items and labels, as in data.x and data.y"
    if isinstance(x, tuple | list):
        return (
            ": torch.stack makes a batch of a sequence of tensors, torch.tensor of one of numbers"
        )
    return ""


def read_items(model: nn.Module, x: Any) -> tuple[Network, Items]:
    """Read a model at inputs, which may be one without a batch dimension.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` numbers, or ``input_shape``: what the model takes as a batch
            is one.

    Returns:
        The network and the inputs.

    Raises:
        TypeError: as :func:`as_tensor`, and where the model is no module.
        ValueError: as :func:`as_tensor` and :func:`crcbook.networks.read_network`.
    """
    x, failed = as_tensor(x), None
    for batch in (x, x[None]):
        if batch.dim() > 1:
            try:
                network = read_network(model, batch)
            except ValueError as error:
                failed = failed or error
                continue
            return network, Items(as_inputs(batch, network), batch.shape, batch.dtype)
    assert failed is not None
    raise failed


def as_inputs(x: Any, network: Network) -> Tensor:
    """Check inputs and flatten them.

    Args:
        x: ``(batch, *input_shape)``, real and finite.
        network: the network they are for.

    Returns:
        ``(batch, n)`` float64 on the network's device.

    Raises:
        TypeError: as :func:`as_tensor`.
        ValueError: for an empty batch, a wrong shape, NaN or infinity.
    """
    x = as_tensor(x)
    if x.dim() < 2 or x[0].numel() != network.inputs:
        raise ValueError(
            f"x must be (batch, *input_shape) with at least one item and {network.inputs} values "
            f"an item; got {tuple(x.shape)}"
        )
    return x.flatten(1).to(network.device, torch.float64)


def as_classes(name: str, classes: Any, network: Classifier, batch: int | None = None) -> Tensor:
    """Check class indices.

    Args:
        name: the argument's name, for the message.
        classes: an integer, or a tensor, an array or a sequence of them.
        network: the network they are for.
        batch: the length they must have; None for any.

    Returns:
        int64 classes on the network's device.

    Raises:
        TypeError: for anything but integers.
        ValueError: for a wrong shape or a class the model lacks.
    """
    found = _numbers(name, classes)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(
            f"{name} must hold integers, the indices of classes; got {_short(found)}"
            f"{_as_integers(name, found)}"
        )
    found = found.to(torch.int64)  # few dtypes of integers can be compared
    if batch is not None and tuple(found.shape) != (batch,):
        raise ValueError(
            f"{name} must be ({batch},), one class an item, or ({batch}, {network.classes}) "
            f"one-hot rows; got {tuple(found.shape)}"
            f"{f': give {name}[:, 0]' if tuple(found.shape) == (batch, 1) else ''}"
        )
    if found.numel() and not ((found >= 0) & (found < network.classes)).all():
        raise ValueError(
            f"{name} must be in 0..{network.classes - 1}; got values from {int(found.min())} "
            f"to {int(found.max())}"
        )
    return found.to(network.device)


def _as_integers(name: str, values: Tensor) -> str:
    """What to do about labels that are no integers, where they stand for some."""
    whole = values.is_floating_point() and bool((values == values.round()).all())
    return f": convert them, {name}.long()" if whole or values.dtype == torch.bool else ""


def as_labels(y: Any, network: Classifier, items: Items) -> Tensor:
    """Check labels.

    Args:
        y: ``(batch,)`` integers, ``(batch, classes)`` one-hot rows, or None for what the model
            predicts; of one item also a number or a row.
        network: the network they are for.
        items: the inputs.

    Returns:
        ``(batch,)`` int64 on the network's device.

    Raises:
        TypeError: for anything but integers.
        ValueError: for a wrong shape, a class the model lacks, or rows that are not one-hot.
    """
    if y is None:
        return network.logits(items.x).argmax(1)
    found = _numbers("y", y)
    row = found.dim() == 1 and len(found) == network.classes > 1
    if len(items) == 1 and (found.dim() == 0 or row):
        found = found[None]
    if found.dim() == 2 and tuple(found.shape) == (len(items), network.classes):
        ones = found == 1
        if not ((ones.sum(1) == 1) & ((found == 0) | ones).all(1)).all():
            raise ValueError("y of two dimensions must have rows of zeros and a single one")
        found = ones.to(torch.int64).argmax(1)
    return as_classes("y", found, network, batch=len(items))


def _numbers(name: str, values: Any) -> Tensor:
    """A plain tensor of some values."""
    try:
        if isinstance(values, np.ndarray):
            values = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
        found = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must hold integers; got {_short(values)}") from error
    if found.layout != torch.strided or found.is_nested or found.is_meta:
        raise TypeError(f"{name} must be a dense tensor that holds numbers; got {_short(values)}")
    return found


def as_box(
    box: Any, x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype = torch.float64
) -> Box | None:
    """Check a box and that it holds the inputs.

    An input may lie outside by four roundings of its precision: the box then reaches as far as
    the input does.

    Args:
        box: the lowest and the highest valid value, numbers or tensors that broadcast to an
            input's shape or to that of all inputs; None for no box.
        x: ``(batch, n)`` float64 inputs, already checked.
        shape: ``(batch, *input_shape)``, as they were given; None for that of ``x``.
        dtype: their precision, as they were given.

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
        first, second = box
        ends = [
            torch.as_tensor(end, dtype=x.dtype, device=x.device).detach() for end in (first, second)
        ]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"box must be a pair (lowest, highest); got {_short(box)}") from error
    lower, upper = (_spread(end, torch.Size(shape or x.shape), x.shape[1]) for end in ends)
    if not (lower <= upper).all():
        raise ValueError(f"the box must have lowest <= highest; got {_short(box)}")
    beside = _BESIDE * torch.finfo(dtype).eps
    outside = (x < lower - beside * lower.abs()) | (x > upper + beside * upper.abs())
    if outside.any():
        raise ValueError(
            f"the box must hold every input; {int(outside.any(1).sum())} of {len(x)} lie outside, "
            f"with values from {x.min():g} to {x.max():g}, where the box is from {lower.min():g} "
            f"to {upper.max():g}: it is in the units of x"
        )
    least, most = (x, x) if lower.dim() > 1 or upper.dim() > 1 else (x.amin(0), x.amax(0))
    return Box(torch.minimum(lower, least), torch.maximum(upper, most))


def _spread(end: Tensor, shape: torch.Size, n: int) -> Tensor:
    """An end of a box for every coordinate, ``(n,)``, or of every input, ``(batch, n)``."""
    if end.isnan().any():
        raise ValueError("an end of the box must be a number, not NaN")
    batch, item = shape[0], shape[1:]
    try:
        if end.dim() == len(shape) and end.shape[0] == batch > 1:
            return end.expand(shape).flatten(1)
        if end.dim() < len(shape) or end.shape[0] == 1:
            whole = end[0] if end.dim() == len(shape) else end
            return whole.expand(item).flatten()
    except RuntimeError:
        pass  # it may be flat
    if end.numel() == n:
        return end.flatten()
    if tuple(end.shape) == (batch, n):
        return end
    raise ValueError(
        f"an end of the box must be one number or {n}, an input's, or broadcast to the shape "
        f"{tuple(shape)} of all inputs; got {tuple(end.shape)}"
    )


def as_radius(radius: Any) -> float:
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
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"radius must be a real number; got {_short(radius)}") from error
    if isinstance(radius, bool):
        raise TypeError(f"radius must be a real number; got {radius}")
    if not 0 < value < math.inf:
        raise ValueError(f"radius must be positive and finite; got {value:g}")
    if not SMALLEST_RADIUS <= value <= LARGEST:
        raise ValueError(f"radius must be from {SMALLEST_RADIUS:g} to {LARGEST:g}; got {value:g}")
    return value


def as_radii(radius: Any, items: Items) -> Tensor:
    """Check radii, a number or one an item.

    Args:
        radius: an l2 distance, or ``(batch,)`` of them.
        items: the inputs.

    Returns:
        ``(batch,)`` float64 on the inputs' device.

    Raises:
        TypeError: where they are no real numbers.
        ValueError: for a wrong shape, or where one is not between 1e-100 and 1e100.
    """
    if radius is None:
        raise TypeError("radius must be a real number, or one an item; got None")
    if not isinstance(radius, Tensor | np.ndarray | Sequence) or isinstance(radius, str):
        return torch.full_like(items.x[:, 0], as_radius(radius))
    try:
        found = _numbers("radius", radius)
    except TypeError as error:
        raise TypeError(f"radius must be a real number; got {_short(radius)}") from error
    if found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"radius must be a real number, or one an item; got {found.dtype}")
    if found.dim() and tuple(found.shape) != (len(items),):
        raise ValueError(
            f"radius must be a number, or ({len(items)},), one an item; got {tuple(found.shape)}"
        )
    found = found.to(items.x).expand(len(items))
    for end in (found.min(), found.max()):
        as_radius(torch.nan if found.isnan().any() else end)
    return found


def as_count(name: str, value: Any, least: int = 1) -> int:
    """Check a number of things.

    Args:
        name: the argument's name, for the message.
        value: an integer of any kind.
        least: the smallest one that will do.

    Returns:
        The number.

    Raises:
        TypeError: where it is no integer.
        ValueError: where it is too small, or no 64 bits hold it.
    """
    try:
        count = operator.index(value)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} must be an integer; got {_short(value)}") from error
    if not least <= count < 2**63:
        raise ValueError(f"{name} must be at least {least} and below 2**63; got {count}")
    return count


def _short(value: Any) -> str:
    """What came, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    shown = repr(value)
    return shown if len(shown) <= 60 else type(value).__name__
