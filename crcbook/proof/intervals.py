r"""Where preactivations stay in a ball, and the ranges of slopes and bends there."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.networks import Layer, Network
from crcbook.proof.arithmetic import OUTWARD, UNIT, matrix_interval
from crcbook.proof.box import Allowed
from crcbook.proof.rounding import RoundingModel

# Of one hidden layer: lowest and highest slope, lowest and highest bend, ``(batch, width)`` each.
Ranges = tuple[Tensor, Tensor, Tensor, Tensor]
Interval = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Region:
    """The l2 balls around some inputs, or what a box leaves of them.

    Attributes:
        x: ``(batch, n)`` float64.
        radius: ``(batch,)`` float64.
        allowed: the displacements that the box leaves the inputs; None for all.
    """

    x: Tensor
    radius: Tensor
    allowed: Allowed | None = None


def preactivation_intervals(
    rounding: RoundingModel,
    x: Tensor,
    radius: Tensor,
    allowed: Allowed | None = None,
    first: Interval | None = None,
) -> list[Interval]:
    r"""Where each hidden layer's preactivations stay in balls around the inputs.

    The first layer moves by at most :math:`\rho` times the norms of its rows, and no further than
    the box lets it. For the layers above, two bounds meet: interval arithmetic on the activations,
    and the Lipschitz constant :math:`\|w\| \prod g\|W_J\|` of a row.

    Args:
        rounding: the float64 network with its error bounds.
        x: ``(batch, n)`` inputs.
        radius: ``(batch,)`` l2 radii of the balls.
        allowed: the displacements that the box leaves; None for all.
        first: ``(batch, width)`` ends that the first layer's are known to keep; None for none.

    Returns:
        ``(batch, width)`` lower and upper ends a hidden layer.
    """
    values = rounding.network.preactivations(x)
    errors = rounding.preactivation_errors(x.norm(dim=1))
    steepness, intervals, ends = 1.0, [], None
    for (layer, norm, _, _), z, error in zip(rounding.hidden(), values, errors, strict=True):
        reach = steepness * radius[:, None] * layer.weight.norm(dim=1) * OUTWARD + error[:, None]
        low, high = z - reach, z + reach
        if ends is not None:
            down, up = matrix_interval(*ends, layer.weight.T)
            low, high = low.fmax(down + layer.bias), high.fmin(up + layer.bias)
        elif first is not None:
            low, high = low.maximum(first[0]), high.minimum(first[1])
        if ends is None and allowed is not None:
            down, up = matrix_interval(allowed.low, allowed.high, layer.weight.T)
            low = low.maximum(z + down - error[:, None])
            high = high.minimum(z + up + error[:, None])
        low, high = widened(low, high, error[:, None])
        intervals.append((low, high))
        ends = layer.activation.value_interval(low, high)
        steepness = steepness * norm * layer.activation.max_slope * OUTWARD
    return intervals


def widened(low: Tensor, high: Tensor, error: Tensor | float = 0.0) -> Interval:
    """An interval whose ends are sums of a few terms, wider by what their rounding takes.

    An end is at most two sums away from its terms, such as ``(z + down) - error``, and each is
    rounded by a unit of the end and of the error; what a reach is multiplied by
    (:data:`crcbook.proof.arithmetic.OUTWARD`) is more than its own sum loses. The widening is a
    third sum: three units of the eight.

    Args:
        low: lower ends.
        high: upper ends.
        error: the size of another term of the sums.

    Returns:
        The ends, rounded outward.
    """
    return low - (low.abs() + error) * 8 * UNIT, high + (high.abs() + error) * 8 * UNIT


def activation_ranges(network: Network, intervals: list[Interval]) -> list[Ranges]:
    """The ranges of the slopes and bends where preactivations stay in intervals.

    Args:
        network: the float64 network.
        intervals: ``(batch, width)`` lower and upper ends a hidden layer.

    Returns:
        Ranges ``(batch, width)`` a hidden layer.
    """
    return [
        ranges_of(layer, *ends) for layer, ends in zip(network.layers[:-1], intervals, strict=True)
    ]


def ranges_of(layer: Layer, low: Tensor, high: Tensor) -> Ranges:
    """The ranges of a layer's slopes and bends over intervals.

    Args:
        layer: a hidden layer.
        low: lower ends of its preactivations.
        high: upper ends.

    Returns:
        The ranges, each of the ends' shape.
    """
    row = layer.activation
    return (*row.slope_interval(low, high), *row.bend_interval(low, high))


def line_ranges(layer: Layer) -> Ranges:
    """The ranges of a layer's slopes and bends over all of R^n.

    Args:
        layer: a hidden layer.

    Returns:
        The ranges, ``(width,)`` each.
    """
    found = torch.empty(4, len(layer.bias), dtype=layer.bias.dtype, device=layer.bias.device)
    for row, units in layer.activation.groups():
        for ends, end in zip(found, (*row.slope_range, *row.bend_range), strict=True):
            ends[units] = end
    low_slope, high_slope, low_bend, high_bend = found
    return low_slope, high_slope, low_bend, high_bend
