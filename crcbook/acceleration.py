"""Anderson's acceleration of fixed-point iterations.

Repeating a map until nothing changes can be slow, or cycle. Both the search for a quadratic and the
attacks repeat one; a memory of two changes saves them most of their steps.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

_PARALLEL = 1e-4  # the squared sine of the angle below which two changes count as one


@dataclass
class Acceleration:
    r"""A batch of fixed-point iterations, and what their last steps taught.

    For a map g with :math:`m = g(c) - c`, the way that is left, the next point is

    .. math:: c + m - \sum_j \gamma_j (\Delta_j c + \Delta_j m), \qquad
       \gamma = \arg\min \Bigl\|m - \sum_j \gamma_j \Delta_j m\Bigr\|,

    over the last two changes :math:`\Delta_j`: if g were affine, where the smallest way is left
    (Walker & Ni 2011). With one change it is the secant method. Where the two are all but
    parallel, the older one is left out.
    """

    point: Tensor | None = None
    move: Tensor | None = None
    changes: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of g(c) and of m

    def step(self, point: Tensor, move: Tensor) -> Tensor:
        """The next change of the points.

        Args:
            point: ``(pairs, n)`` where the iterations are.
            move: ``(pairs, n)`` the full steps from there.

        Returns:
            ``(pairs, n)``.
        """
        if self.point is not None and self.move is not None:
            change = move - self.move
            self.changes = [(change + (point - self.point), change), *self.changes[:1]]
        self.point, self.move = point, move
        step = move
        for share, (image, _) in zip(self._shares(move), self.changes, strict=True):
            share = share.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            step = torch.addcmul(step, share[:, None], image, value=-1)
        return step

    def _shares(self, move: Tensor) -> list[Tensor]:
        if not self.changes:
            return []
        newest = self.changes[0][1]
        square, along = (newest * newest).sum(1), (newest * move).sum(1)
        if len(self.changes) == 1:
            return [along / square]
        older = self.changes[1][1]
        cross, older_square = (newest * older).sum(1), (older * older).sum(1)
        older_along = (older * move).sum(1)
        # In ratios: products of squares leave the range of float32.
        first, second = along / square, older_along / older_square
        over, under = cross / square, cross / older_square
        rest = 1 - over * under
        two, (both, more) = rest > _PARALLEL, (first - over * second, second - under * first)
        return [torch.where(two, both / rest, first), torch.where(two, more / rest, 0.0)]

    def take(self, index: Tensor) -> "Acceleration":
        """Some of the iterations.

        Args:
            index: positions.

        Returns:
            Their acceleration.
        """
        if self.point is None or self.move is None:
            return self
        changes = [
            (image.index_select(0, index), change.index_select(0, index))
            for image, change in self.changes
        ]
        point, move = (column.index_select(0, index) for column in (self.point, self.move))
        return Acceleration(point, move, changes)
