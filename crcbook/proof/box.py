r"""Where an adversary may go: an l2 ball, a box, or both.

Around an input :math:`x_0` a box is given by the lowest and highest displacement of each
coordinate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.proof.arithmetic import OUTWARD, TINY_NORM


@dataclass(frozen=True)
class Box:
    """A box of valid inputs, one for all of them or one each.

    Attributes:
        lower: ``(n,)`` or ``(batch, n)`` float64.
        upper: ``(n,)`` or ``(batch, n)`` float64.
    """

    lower: Tensor
    upper: Tensor

    def clip(self, point: Tensor) -> Tensor:
        """The nearest points of the box.

        Args:
            point: ``(batch, n)``.

        Returns:
            ``(batch, n)``.
        """
        return point.clamp(self.lower, self.upper)

    def take(self, index: Tensor | slice) -> "Box":
        """The boxes of some inputs.

        Args:
            index: their positions, or a slice of them.

        Returns:
            Their boxes; itself where all inputs have one.
        """
        return self if self.lower.dim() == 1 else Box(self.lower[index], self.upper[index])

    def around(self, x0: Tensor) -> "Allowed":
        """The displacements that stay in the box, rounded outward.

        Args:
            x0: ``(batch, n)`` float64 inputs in the box.

        Returns:
            What each input may be displaced by.
        """
        infinity = torch.full_like(x0, torch.inf)
        low = torch.nextafter(self.lower - x0, -infinity).clamp(max=0)
        return Allowed(low, torch.nextafter(self.upper - x0, infinity).clamp(min=0))


def clip(box: Box | None, point: Tensor) -> Tensor:
    """The nearest points of a box.

    Args:
        box: the box; None for all of R^n.
        point: ``(batch, n)``.

    Returns:
        ``(batch, n)``.
    """
    return point if box is None else box.clip(point)


@dataclass(frozen=True)
class Allowed:
    """Displacements an adversary may use, coordinate by coordinate.

    Attributes:
        low: ``(pairs, n)``, at most 0.
        high: ``(pairs, n)``, at least 0.
    """

    low: Tensor
    high: Tensor

    def take(self, index: Tensor) -> "Allowed":
        """The displacements at ``index``.

        Args:
            index: positions or a mask.

        Returns:
            The chosen ones.
        """
        return Allowed(self.low[index], self.high[index])

    def to(self, dtype: torch.dtype) -> "Allowed":
        """The same, rounded, for a search.

        Args:
            dtype: a floating-point dtype.

        Returns:
            The displacements.
        """
        return Allowed(self.low.to(dtype), self.high.to(dtype))

    def clip(self, displacement: Tensor) -> Tensor:
        """The nearest displacements that stay inside.

        Args:
            displacement: ``(pairs, n)``.

        Returns:
            ``(pairs, n)``.
        """
        return displacement.clamp(self.low, self.high)

    def contains(self, displacement: Tensor) -> Tensor:
        """Which displacements stay inside.

        Args:
            displacement: ``(pairs, n)``.

        Returns:
            ``(pairs,)`` bool.
        """
        return ((self.low <= displacement) & (displacement <= self.high)).all(dim=1)

    def longest(self) -> Tensor:
        """The length of the longest displacement, rounded upward.

        Returns:
            ``(pairs,)``.
        """
        return torch.maximum(-self.low, self.high).norm(dim=1) * OUTWARD + TINY_NORM
