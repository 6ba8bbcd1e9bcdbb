"""Layers with several activations, as branches beside each other have them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from crcbook.activations import Activation


@dataclass(frozen=True)
class Mixed(Activation):
    """Several activations in one layer, each applied to a group of its units.

    A layer that carries branches beside each other has one: what waits for another branch is
    carried by the identity. Tensors have the units last. What is said of the whole line, such as
    the largest slope, holds for every group.

    Attributes:
        parts: the row of each group and how many units it has, in order.
    """

    parts: tuple[tuple[Activation, int], ...] = ()

    @cached_property
    def slope_range(self) -> tuple[float, float]:
        """The hull of the groups' ranges."""
        return _hull([row.slope_range for row, _ in self.parts])

    @cached_property
    def bend_range(self) -> tuple[float, float]:
        """The hull of the groups' ranges."""
        return _hull([row.bend_range for row, _ in self.parts])

    @property
    def at_zero(self) -> float:
        """The largest of the groups'."""
        return max(row.at_zero for row, _ in self.parts)

    def groups(self) -> Iterator[tuple[Activation, slice]]:
        """The rows, each with its units."""
        first = 0
        for row, count in self.parts:
            yield row, slice(first, first + count)
            first += count

    def take(self, units: Tensor) -> Activation:
        """The activation of some of the units, which are in ascending order."""
        counts = (
            int(((units >= where.start) & (units < where.stop)).sum()) for _, where in self.groups()
        )
        return mixed([(row, count) for (row, _), count in zip(self.parts, counts, strict=True)])

    def value_interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of each group's values over the intervals."""
        return self._intervals("value_interval", lower, upper)

    def slope_interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of each group's slopes over the intervals."""
        return self._intervals("slope_interval", lower, upper)

    def bend_interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of each group's bends over the intervals."""
        return self._intervals("bend_interval", lower, upper)

    def _intervals(self, method: str, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        ends = (
            getattr(row, method)(lower[..., where], upper[..., where])
            for row, where in self.groups()
        )
        low, high = (torch.cat(side, dim=-1) for side in zip(*ends, strict=True))
        return low, high


def mixed(parts: Sequence[tuple[Activation, int]]) -> Activation:
    """The activation of a layer whose units have several.

    Args:
        parts: the row of each group of units and how many there are, in order.

    Returns:
        That row alone where all are the same.
    """
    groups: list[tuple[Activation, int]] = []
    flat = (
        one for row, n in parts for one in (row.parts if isinstance(row, Mixed) else [(row, n)])
    )
    for row, count in flat:
        if groups and (groups[-1][0].name, groups[-1][0].settings) == (row.name, row.settings):
            groups[-1] = groups[-1][0], groups[-1][1] + count
        elif count:
            groups.append((row, count))
    rows = [row for row, _ in groups]
    if len(rows) == 1:
        return rows[0]
    return Mixed(
        name="mixed",
        value=partial(_by_group, tuple(groups), "value"),
        slope=partial(_by_group, tuple(groups), "slope"),
        bend=partial(_by_group, tuple(groups), "bend"),
        value_extrema=(),  # each group has its own
        slope_extrema=(),
        bend_extrema=(),
        slope_limits=_hull([row.slope_limits for row in rows]),
        value_range=_hull([row.value_range for row in rows]),
        deviation=max(row.deviation for row in rows),
        deviates_from=min(row.deviates_from for row in rows),
        exponent=max(row.exponent for row in rows),
        parts=tuple(groups),
    )


def _by_group(parts: tuple[tuple[Activation, int], ...], function: str, z: Tensor) -> Tensor:
    """What every group makes of its units, the last dimension."""
    pieces = z.split([count for _, count in parts], dim=-1)
    return torch.cat(
        [getattr(row, function)(piece) for (row, _), piece in zip(parts, pieces, strict=True)],
        dim=-1,
    )


def _hull(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    ends = [end for one in ranges for end in one]
    return min(ends), max(ends)
