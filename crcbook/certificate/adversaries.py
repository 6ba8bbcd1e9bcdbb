"""Adversarial points beside what is proved: they say how much a proof leaves open."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from crcbook.attacks import Aim, crossings, descend, first_in_precision, steps_to_boundary
from crcbook.certificate.table import Table, proved_radii
from crcbook.proof.arithmetic import OUTWARD
from crcbook.proof.box import Box, clip
from crcbook.proof.prover import Entries, Prover
from crcbook.stages.dual import at_boundary, into_reach

EXACT = 1e-6  # of the radius: how close an adversary must be for it to be the distance
_CROSSING_STEPS = (3, 30)  # of attacks that look for the nearest adversary: the short one first
# Towards every class, and then towards those that are not farther than the nearest, times the last.
_RANK_STEPS, _EVERY_CLASS_STEPS, _RANKED = 3, 10, 1.2
# Across the boundary, as shares of the distance, until no rounding can be to blame.
_ACROSS = (0.5 * EXACT, 1e-4, 1e-2)
_DESCENT_STEPS = 4  # of one in a ball, which begins where a proof's search ended
_SPARE = 1e-6  # of a ball's radius: as far from its surface, a point can be rounded to float32


@dataclass(frozen=True)
class Limits:
    """The radii of some images, and the adversarial points that bound them from above.

    Attributes:
        radius: ``(images,)`` float64, the smallest bound of each; 0 where it is misclassified.
        column: ``(images,)`` where in the table that is.
        point: ``(images, n)`` float64 points proved to be adversarial; NaN where none was found.
        distance: ``(images,)`` float64, how far they are at most; infinity where there is none.
    """

    radius: Tensor
    column: Tensor
    point: Tensor
    distance: Tensor

    @classmethod
    def of(cls, table: Table, before: "Limits | None" = None) -> "Limits":
        """Read a table, and look for adversarial points.

        Args:
            table: the bounds of radii.
            before: what was found when fewer bounds had been raised.

        Returns:
            The limits.
        """
        correct = table.images.correct
        radius, column = proved_radii(table)
        if before is None:
            point = torch.full_like(table.images.x, torch.nan)
            before = cls(radius, column, point, torch.full_like(radius, torch.inf))
            rows = torch.arange(len(radius), device=radius.device)
        else:
            rows = (radius > before.radius).nonzero().squeeze(1)
        entries = _entries(table, rows, column[rows])
        found = _nearest(table, entries, correct[rows], radius[rows])
        limits = cls(radius, column, before.point, before.distance)
        return limits._with(rows, found, distance_bound(entries.x, found))

    def _with(self, rows: Tensor, found: Tensor, away: Tensor) -> "Limits":
        """The limits with other points of some images where those are nearer."""
        point, distance = self.point.clone(), self.distance.clone()
        nearer = away < distance[rows]
        point[rows[nearer]], distance[rows[nearer]] = found[nearer], away[nearer]
        return Limits(self.radius, self.column, point, distance)

    def far(self, table: Table, share: float) -> Tensor:
        """Where a radius is a small share of the distance of the nearest adversary known.

        Args:
            table: the bounds of radii.
            share: a smaller share is small.

        Returns:
            ``(images,)`` bool; False for those that are misclassified.
        """
        return table.images.correct & (self.radius < share * self.distance)

    def nearer(self, table: Table, chosen: Tensor) -> "Limits":
        """Look for adversarial points of every class.

        Args:
            table: the bounds of radii.
            chosen: ``(images,)`` bool, where to look.

        Returns:
            The limits.
        """
        rows = chosen.nonzero().squeeze(1)
        if not len(rows):
            return self
        count = table.bound.shape[1]
        columns = torch.arange(count, device=rows.device)
        every = _entries(table, rows.repeat_interleave(count), columns.repeat(len(rows)))
        near = steps_to_boundary(Aim.of(table.prover, every, table.box), every.x, _RANK_STEPS)
        away = (near - every.x).norm(dim=1).reshape(len(rows), count)
        best = (away <= _RANKED * away.amin(1, keepdim=True)).flatten().nonzero().squeeze(1)
        entries = every.take(best)
        found = _crossing(table, entries, entries.x, _EVERY_CLASS_STEPS)
        away = torch.full_like(away.flatten(), torch.inf)
        away[best] = distance_bound(entries.x, found)
        away, column = away.reshape(len(rows), count).min(1)
        near[best] = found
        near = near.reshape(len(rows), count, -1)[torch.arange(len(rows)).to(rows), column]
        return self._with(rows, near, away)

    def exact(self) -> Tensor:
        """Where the point is at the radius, up to a millionth; a misclassified image is its own.

        Returns:
            ``(images,)`` bool.
        """
        reached = (self.radius > 0) & (self.distance <= self.radius * (1 + EXACT))
        return (reached | (self.distance == 0)) & self.distance.isfinite()


@dataclass(frozen=True)
class Attacked:
    """What a short attack finds in balls that are not proved to be safe.

    Attributes:
        point: ``(images, n)`` float64 points proved to be adversarial; NaN where none was found.
        margin: ``(images,)`` float64, the lowest margin found; that at the input where none was
            looked for.
        column: ``(images,)`` the class attacked: of those not proved, the one of the largest logit.
    """

    point: Tensor
    margin: Tensor
    column: Tensor

    @classmethod
    def of(cls, table: Table, radius: Tensor) -> "Attacked":
        """Attack the balls of a table. A misclassified image is its own adversarial point.

        Args:
            table: the bounds of margins.
            radius: ``(images,)`` the balls' radii.

        Returns:
            What was found.
        """
        doubt, correct = table.bound <= 0, table.images.correct
        column = torch.where(correct, doubt.int().argmax(1), 0)
        rows = (doubt.any(1) | ~correct).nonzero().squeeze(1)
        point = torch.full_like(table.images.x, torch.nan)
        margin = table.images.value.gather(1, column[:, None]).squeeze(1)
        entries = _entries(table, rows, column[rows])
        aim = Aim.of(table.prover, entries, table.box)
        start, ball = entries.x + entries.start.double(), radius[rows] * (1 - _SPARE)
        found, margin[rows] = descend(aim, ball, start, _DESCENT_STEPS, decide=True)
        found = torch.where(correct[rows, None], found, entries.x)
        proved = _is_adversarial(table.prover, entries, found)
        point[rows] = found.masked_fill(~proved[:, None], torch.nan)
        return cls(point, margin, column)

    @property
    def found(self) -> Tensor:
        """``(images,)`` bool, where there is a point."""
        return self.point.isfinite().all(1)

    def far_from(self, table: Table, share: float) -> Tensor:
        """Where the fall that is found is well below the fall that is not excluded.

        Args:
            table: the bounds.
            share: what counts as near.

        Returns:
            ``(images,)`` bool.
        """
        value, bound = (
            whole.gather(1, self.column[:, None]).squeeze(1)
            for whole in (table.images.value, table.bound)
        )
        return value - self.margin < share * (value - bound)


@dataclass(frozen=True)
class Rounding:
    """Adversarial points in the precision that their inputs were given in.

    Attributes:
        prover: the network.
        x: ``(images, n)`` float64 inputs.
        y: ``(images,)`` their labels.
        dtype: the precision.
        box: where points must stay; None for everywhere.
    """

    prover: Prover
    x: Tensor
    y: Tensor
    dtype: torch.dtype
    box: Box | None

    def __call__(self, point: Tensor, radius: Tensor | None = None) -> Tensor:
        """The nearest points found of that precision that are proved to be adversarial as well.

        Args:
            point: ``(images, n)`` float64 points; NaN where there is none.
            radius: ``(images,)`` of the balls to stay in, which are searched inward; None to search
                outward.

        Returns:
            ``(images, n)`` float64; NaN where there is none.
        """
        good, inward = partial(self._good, radius), radius is not None
        return first_in_precision(self.x, point, self.box, inward, good, self.dtype)

    def _good(self, radius: Tensor | None, rows: Tensor, point: Tensor) -> Tensor:
        network, y = self.prover.network, self.y[rows]
        active = network.active(point)
        target = network.outputs(active).scatter(1, y[:, None], -torch.inf).argmax(1)
        good = network.margin(active, y, target) + self.prover.margin_error(y, target, point) <= 0
        if radius is not None:
            good &= (point - self.x[rows]).norm(dim=1) * OUTWARD <= radius[rows]
        return good


def distance_bound(x: Tensor, point: Tensor) -> Tensor:
    """How far points are from inputs, rounded upward.

    Args:
        x: ``(batch, n)`` float64.
        point: ``(batch, n)`` float64; NaN where there is none.

    Returns:
        ``(batch,)`` l2 distances; infinity where there is no point.
    """
    return (point - x).norm(dim=1).nan_to_num(nan=torch.inf) * OUTWARD


def _entries(table: Table, rows: Tensor, column: Tensor) -> Entries:
    """The entries of some images, in a column each."""
    index = rows * table.bound.shape[1] + column
    goal = torch.full_like(table.bound[:, 0], torch.inf)
    return table.entries(index, goal, table.box is not None)


def _nearest(table: Table, entries: Entries, correct: Tensor, radius: Tensor) -> Tensor:
    """Adversarial points, NaN where none is proved; a misclassified image is its own.

    Overshooting the radius by a hair, where the quadratic falls fastest, finds the nearest one
    wherever the radius is exact. For the others it is where an attack starts.
    """
    prover, box = table.prover, table.box and table.box.take(entries.image)
    quadratic, evaluation = prover.prove(entries, into_reach(entries, entries.start.double()))
    way = quadratic.nearest(quadratic.radius())
    point = clip(box, entries.x + (1 + 0.9 * EXACT) * way)
    point = torch.where(correct[:, None], point, entries.x)
    close = (point - entries.x).norm(dim=1) <= radius * (1 + EXACT)
    hit = ~correct | (close & at_boundary(quadratic, evaluation))
    likely = hit.nonzero().squeeze(1)
    hit[likely] = _is_adversarial(prover, entries.take(likely), point[likely])
    for steps in _CROSSING_STEPS:
        missed = (correct & ~hit & radius.isfinite()).nonzero().squeeze(1)
        if not len(missed):
            break
        found = _crossing(table, entries.take(missed), point[missed], steps)
        hit[missed] = found.isfinite().all(1)
        point[missed] = torch.where(hit[missed, None], found, entries.x[missed])
    return point.masked_fill((~hit | radius.isinf())[:, None], torch.nan)


def _crossing(table: Table, entries: Entries, start: Tensor, steps: int) -> Tensor:
    """Points proved to be adversarial, as near as an attack gets; NaN where it finds none."""
    begin = entries.z if len(table.prover.network.layers) > 1 else None
    aim = Aim.of(table.prover, entries, table.box)
    crossing = crossings(aim, start, steps, begin)
    point, left = torch.full_like(crossing, torch.nan), torch.arange(len(crossing)).to(start.device)
    for share in _ACROSS:
        few = aim.take(left)
        found = clip(few.box, crossing[left] + share * (crossing[left] - few.x))
        proved = _is_adversarial(table.prover, entries.take(left), found)
        point[left[proved]] = found[proved]
        left = left[~proved & crossing[left].isfinite().all(1)]
        if not len(left):
            break
    return point


def _is_adversarial(prover: Prover, entries: Entries, point: Tensor) -> Tensor:
    """Whether margins are proved not to be positive at points."""
    margin, error = prover.margin_at(entries, point)
    return margin + error <= 0
