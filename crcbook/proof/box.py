r"""Where an adversary may go: an l2 ball, a box, or both.

For an input :math:`x_0` a box is given by its *room*: the lowest and highest displacement of each
coordinate. The point of a region where a linear function with gradient g falls most is
:math:`x_0 + \mathrm{clip}(-\eta g)` for some :math:`\eta`; the functions here find it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.proof.arithmetic import OUTWARD, TINY_NORM

_PASSES = 4


@dataclass(frozen=True)
class Box:
    """A box of valid inputs.

    Attributes:
        lower: ``(n,)`` float64.
        upper: ``(n,)`` float64.
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

    def room(self, x0: Tensor) -> "Room":
        """The displacements that stay in the box, rounded outward.

        Args:
            x0: ``(batch, n)`` float64 inputs in the box.

        Returns:
            The room of each input.
        """
        infinity = torch.full_like(x0, torch.inf)
        low = torch.nextafter(self.lower - x0, -infinity).clamp(max=0)
        return Room(low, torch.nextafter(self.upper - x0, infinity).clamp(min=0))


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
class Room:
    """Displacements an adversary may use, coordinate by coordinate.

    Attributes:
        low: ``(pairs, n)``, at most 0.
        high: ``(pairs, n)``, at least 0.
    """

    low: Tensor
    high: Tensor

    def take(self, index: Tensor) -> "Room":
        """The rooms at ``index``.

        Args:
            index: positions or a mask.

        Returns:
            The chosen rooms.
        """
        return Room(self.low[index], self.high[index])

    def to(self, dtype: torch.dtype) -> "Room":
        """The same rooms, rounded, for a search.

        Args:
            dtype: a floating-point dtype.

        Returns:
            The rooms.
        """
        return Room(self.low.to(dtype), self.high.to(dtype))

    def clip(self, displacement: Tensor) -> Tensor:
        """The nearest displacements that stay inside.

        Args:
            displacement: ``(pairs, n)``.

        Returns:
            ``(pairs, n)``.
        """
        return displacement.clamp(self.low, self.high)

    def reach(self) -> Tensor:
        """The length of the longest displacement, rounded upward.

        Returns:
            ``(pairs,)``.
        """
        return torch.maximum(-self.low, self.high).norm(dim=1) * OUTWARD + TINY_NORM


def step_to_boundary(margin: Tensor, gradient: Tensor, room: Room | None) -> Tensor:
    r"""The :math:`\eta` at which a linear margin vanishes at :math:`\mathrm{clip}(-\eta g)`.

    Args:
        margin: ``(pairs,)`` the linear margin at the input.
        gradient: ``(pairs, n)`` its gradient g.
        room: the box; None for none.

    Returns:
        ``(pairs,)``, at least 0; infinity where the margin does not vanish in the box.
    """
    square = gradient.square()
    eta = margin / square.sum(1)
    for _ in range(_PASSES if room is not None else 0):
        free, fixed = _split(eta, gradient, room)
        eta = (margin + (gradient * fixed).sum(1)) / (square * free).sum(1)
    return eta.clamp(min=0)


def step_to_sphere(gradient: Tensor, radius: float, room: Room | None) -> Tensor:
    r"""The :math:`\eta` at which :math:`\mathrm{clip}(-\eta g)` has the length ``radius``.

    Args:
        gradient: ``(pairs, n)`` g.
        radius: the l2 length.
        room: the box; None for none.

    Returns:
        ``(pairs,)``, at least 0; infinity where the box lies inside the ball.
    """
    square = gradient.square()
    eta = radius / square.sum(1).sqrt()
    for _ in range(_PASSES if room is not None else 0):
        free, fixed = _split(eta, gradient, room)
        left = (radius * radius - fixed.square().sum(1)).clamp(min=0)
        eta = (left / (square * free).sum(1)).sqrt()
    return eta


def _split(eta: Tensor, gradient: Tensor, room: Room) -> tuple[Tensor, Tensor]:
    """Which coordinates are free at a step, and where the others are held."""
    wanted = -eta[:, None] * gradient
    clipped = room.clip(wanted)
    free = clipped == wanted
    return free, torch.where(free, 0.0, clipped)
