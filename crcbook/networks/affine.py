r"""Affine maps as a model applies them, one after another, and the matrix of them all.

Between two activations a model may normalise, convolve, pool and flatten. Together that is one
affine map :math:`a \mapsto Wa + b`. Its matrix is found by sending the unit vectors through the
steps in float64. A single linear step gives exactly the weights it stores. Several multiply and
add them up, and what that rounds is bounded entry by entry: if :math:`\hat M` is within E of M,
the computed :math:`A\hat M` is within :math:`|A|E + \gamma_k|A||\hat M|` of :math:`AM`, for sums
of k rounded terms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_UNIT = 2.0**-53  # float64's relative rounding
_TINY = 1e-290  # more than underflow takes from sums of numbers of the sizes that are accepted
_OUTWARD = 1 + 2.0**-20  # for the bounds' own rounding
_BLOCK_ENTRIES = 2**22  # of images of unit vectors at once: 32 MB in float64
MOST_ENTRIES = 2 * 10**7  # of a matrix


@dataclass(frozen=True)
class Affine:
    r"""A step :math:`a \mapsto Aa + s`, on a batch of items of any shape.

    Attributes:
        name: what torch calls it.
        linear: ``(batch, *inputs) -> (batch, *outputs)``, :math:`Aa` in float64 on the CPU.
        magnitude: the same with :math:`|A|`.
        terms: how many roundings an entry of :math:`Aa` takes; 0 where entries only move.
        stored: whether the entries of A are numbers that the model stores, or sums of them.
        shift: s, of the items' shape or one that broadcasts to it; None for 0.
        facts: what tells the step from others of its name: arguments and tensors.
        matrix: A where it is a ``(outputs, inputs)`` matrix that acts on a vector.
        ordered: whether entries keep their order, so that only the items' shape changes.
    """

    name: str
    linear: Callable[[Tensor], Tensor]
    magnitude: Callable[[Tensor], Tensor]
    terms: int = 0
    stored: bool = True
    shift: Tensor | None = None
    facts: tuple = ()
    matrix: Tensor | None = None
    ordered: bool = False


@dataclass(frozen=True)
class Composition:
    """The affine map of several steps.

    Attributes:
        weight: ``(outputs, inputs)`` float64.
        bias: ``(outputs,)`` float64.
        weight_error: a bound of the Frobenius norm of what the weight is off by.
        bias_error: a bound of the l2 norm of what the bias is off by.
    """

    weight: Tensor
    bias: Tensor
    weight_error: float
    bias_error: float


def compose(steps: Sequence[Affine], shape: Sequence[int]) -> Composition:
    """Multiply steps out.

    Args:
        steps: the steps, in the order data flows through them; none of them is the identity.
        shape: of an item that the first one takes.

    Returns:
        The matrix and the vector, with bounds of their errors.

    Raises:
        ValueError: where the matrix would have more than ``MOST_ENTRIES`` entries.
    """
    bias, bias_error = _bias(steps, shape)
    entries = bias.numel() * torch.Size(shape).numel()
    if entries > MOST_ENTRIES:
        raise ValueError(
            f"the linear map that ends in {steps[-1].name} has a matrix of {entries:,} entries "
            f"({bias.numel()} outputs, {torch.Size(shape).numel()} inputs), and crcbook keeps "
            f"every map as a matrix of at most {MOST_ENTRIES:,}: use larger strides, earlier "
            "pooling or fewer channels"
        )
    weight, weight_error = _weight(steps, shape)
    return Composition(weight, bias, weight_error, bias_error)


def gamma(terms: int) -> float:
    """The relative error of a sum of so many rounded terms in float64."""
    return terms * _UNIT / (1 - terms * _UNIT)


def _bias(steps: Sequence[Affine], shape: Sequence[int]) -> tuple[Tensor, float]:
    value = torch.zeros((1, *shape), dtype=torch.float64, device="cpu")
    error = torch.zeros_like(value)
    for step in steps:
        size = step.magnitude(value.abs())
        value, error = step.linear(value), step.magnitude(error) + _rounding(step.terms, size)
        if step.shift is not None:
            value = value + step.shift
            error = error + gamma(1) * value.abs() * (size > 0)  # exact where it meets a zero
    return value.flatten(), float(error.norm()) * _OUTWARD


def _weight(steps: Sequence[Affine], shape: Sequence[int]) -> tuple[Tensor, float]:
    inputs, steps = torch.Size(shape).numel(), list(steps)
    while steps and steps[0].ordered:
        shape = shape_after(steps.pop(0), shape)
    if not steps:
        return torch.eye(inputs, dtype=torch.float64, device="cpu"), 0.0
    start = steps[0].matrix if tuple(shape) == (inputs,) else None
    if start is not None and all(step.ordered for step in steps[1:]):
        return start.clone(), 0.0
    if start is not None:
        steps, shape = steps[1:], (len(start),)
    blocks, squares, count = [], 0.0, max(1, _BLOCK_ENTRIES // _widest(steps, shape))
    for first in range(0, inputs, count):
        images = (
            _units(inputs, first, count, shape) if start is None else start.T[first : first + count]
        )
        images, error = _send(steps, images, start is None)
        blocks.append(images.flatten(1))
        squares += float(error.square().sum())
    return torch.cat(blocks).T.contiguous(), squares**0.5 * _OUTWARD


def _send(steps: Sequence[Affine], images: Tensor, units: bool) -> tuple[Tensor, Tensor]:
    """Images of unit vectors after some more steps, and bounds of their entries' errors.

    As long as an image has one entry that is not 0, a sum has one product: there is one rounding,
    and none where that entry is 1.

    Args:
        steps: the steps.
        images: ``(vectors, *shape)``, exact.
        units: whether they are unit vectors themselves.

    Returns:
        ``(vectors, *shape)`` images and the bounds.
    """
    error, alone = torch.zeros((), device="cpu"), units
    for step in steps:
        terms = min(step.terms, 1) if alone and step.stored else step.terms
        terms = 0 if units and step.stored else terms
        error = step.magnitude(error) if error.dim() else error
        if terms:
            error = error + _rounding(terms, step.magnitude(images.abs()))
        images = step.linear(images)
        units = units and step.terms == 0
        alone = alone and bool(images.reshape(len(images), -1).count_nonzero(1).max() <= 1)
        units = units and alone
    return images, error


def _rounding(terms: int, size: Tensor) -> Tensor:
    return gamma(terms) * size + _TINY * (size > 0) if terms else torch.zeros_like(size)


def _units(inputs: int, first: int, count: int, shape: Sequence[int]) -> Tensor:
    count = min(count, inputs - first)
    units = torch.zeros(count, inputs, dtype=torch.float64, device="cpu")
    units[torch.arange(count, device="cpu"), first + torch.arange(count, device="cpu")] = 1
    return units.reshape(count, *shape)


def shape_after(step: Affine, shape: Sequence[int]) -> torch.Size:
    """The shape of an item after a step.

    Args:
        step: the step.
        shape: of an item before it.

    Returns:
        The shape.
    """
    return step.linear(torch.zeros((1, *shape), dtype=torch.float64, device="cpu")).shape[1:]


def _widest(steps: Sequence[Affine], shape: Sequence[int]) -> int:
    """The most entries that an item has on its way."""
    sizes = [torch.Size(shape).numel()]
    for step in steps:
        shape = shape_after(step, shape)
        sizes.append(shape.numel())
    return max(sizes)
