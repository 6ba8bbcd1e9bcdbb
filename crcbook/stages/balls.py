"""Bounds in balls, raised by the curvature that a network has there.

In the order of their price: a search with the curvature of the whole ball, slabs across the way in
which the margin falls (:mod:`crcbook.proof.slabs`), and the curvature followed along the paths from
the centre (:mod:`crcbook.proof.paths`).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from crcbook.attacks import into_ball
from crcbook.proof.box import Box, clip
from crcbook.proof.curvature import ball_curvature, downward_curvature
from crcbook.proof.paths import Neighbourhood
from crcbook.proof.quadratic import Pairs, Prover
from crcbook.proof.slabs import slab_margins
from crcbook.stages.search import POLISH_STEPS, SEARCH_STEPS, search

_SLABS = (8, 32)  # of a ball; the second number where the first one decides nothing
_BENT = 4.0  # times the gradient's norm: a ball's curvature above that leaves too wide a gap
_FLAT = 0.5  # of the curvature over R^n: where a ball's is below, following it gains little
_INSIDE = 1e-9  # of a ball's radius: how far inside it a point of expansion stays
_FEW_INPUTS = 128  # with more, where little is to be gained it is not tried
_HOPELESS = (4.0, 0.25)  # of a margin at its input: how far below 0 slabs, then paths, can mend


@dataclass(frozen=True)
class Balls:
    """Balls around inputs, and what is proved in each of them for every target.

    Attributes:
        prover: the float64 network, with its error bounds.
        x: ``(balls, n)`` centres.
        label: ``(balls,)`` classes.
        targets: ``(balls, targets)`` other classes.
        radii: ``(balls,)`` l2.
        bounds: ``(balls, targets)`` proved: of the margins in the balls where ``radius`` is given,
            or radii that the balls' curvature can raise up to the balls' own.
        radius: that of every ball, for margins; None for radii.
        box: where the adversary must stay; None for everywhere.
    """

    prover: Prover
    x: Tensor
    label: Tensor
    targets: Tensor
    radii: Tensor
    bounds: Tensor
    radius: float | None
    box: Box | None

    def raised(self) -> Tensor:
        """Better bounds of the pairs that are short of their ball's radius, or of margin 0.

        Returns:
            ``(balls, targets)``, nowhere smaller than ``bounds``.
        """
        balls = replace(self, bounds=self.bounds.clone())
        balls._raise()
        return balls.bounds

    @cached_property
    def _limit(self) -> Tensor:
        return self.radii if self.radius is None else torch.zeros_like(self.radii)

    @cached_property
    def _margins(self) -> Tensor:
        """``(balls, targets)`` margins at the centres."""
        logits = self.prover.network.logits(self.x)
        return logits.gather(1, self.label[:, None]) - logits.gather(1, self.targets)

    def _short(self) -> Tensor:
        return self.bounds < self._limit[:, None]

    def _near(self, most: float) -> Tensor:
        """The balls without a margin whose bound is too far below 0 to be worth a try."""
        if self.radius is None or self.prover.network.inputs <= _FEW_INPUTS:
            return torch.ones_like(self.label, dtype=torch.bool)
        return (self.bounds > -most * self._margins).all(1)

    def _pairs(self, row: Tensor, column: Tensor, box: Box | None) -> Pairs:
        x, label = self.x.index_select(0, row), self.label[row]
        return Pairs.of(self.prover.network, x, label, self.targets[row, column], box)

    def _raise(self) -> None:
        depth = len(self.prover.network.layers)
        if depth == 1:
            return
        flat = self._search_whole() if depth > 2 else torch.zeros_like(self._short())
        if self.box is None:  # slabs know of none
            self._cut()
        if depth == 2 and self.prover.network.inputs > _FEW_INPUTS:
            return
        curvature = torch.full_like(self.bounds, torch.inf)
        undecided = (self._short() & ~flat).any(1) & self._near(_HOPELESS[1])
        for ball in undecided.nonzero().squeeze(1).tolist():
            self._follow(ball, curvature)
        self._search(curvature)

    def _search_whole(self) -> Tensor:
        """Search with the curvatures of whole balls; tells where they are much the smaller ones."""
        curvature = torch.full_like(self.bounds, torch.inf)
        flat = torch.zeros_like(self._short())
        row, column = self._short().nonzero().T
        room = None if self.box is None else self.box.room(self.x)
        pairs = self.label[row], self.targets[row, column]
        found = ball_curvature(self.prover.rounding, self.x, self.radii, row, *pairs, room)
        everywhere = downward_curvature(self.prover.network, *pairs)
        smaller, flat[row, column] = found < everywhere, found < _FLAT * everywhere
        curvature[row[smaller], column[smaller]] = found[smaller]
        self._search(curvature)
        return flat

    def _search(self, curvature: Tensor) -> None:
        """Search with the balls' curvatures where they are finite."""
        row, column = (self._short() & curvature.isfinite()).nonzero().T
        pairs, radii, limit = self._pairs(row, column, self.box), self.radii[row], self._limit[row]
        pairs = replace(pairs, curvature=torch.minimum(pairs.curvature, curvature[row, column]))
        point, _ = search(self.prover.rough, pairs, pairs.x0, SEARCH_STEPS, limit, self.radius)
        exact = self.prover.network
        if self.radius is None:
            point, _ = search(exact, pairs, point, POLISH_STEPS, limit)
        # The curvature holds in the ball alone: that is where the expansion point must lie.
        point = clip(self.box, into_ball(pairs.x0, point, radii * (1 - _INSIDE)))
        values = exact.margin_and_gradient(point, pairs.label, pairs.target)
        minorant = self.prover.minorant(pairs, point, *values)
        if self.radius is None:
            value = torch.minimum(minorant.radius(), radii)
        else:
            value = minorant.margin(self.radius)
        outside = (point - pairs.x0).norm(dim=1) > radii * (1 - _INSIDE / 2)
        self._put(row, column, value.masked_fill(outside, -torch.inf))

    def _cut(self) -> None:
        """Cut balls into slabs, of each the worst target first.

        What fails for one leaves nothing to be gained from the others.
        """
        row = self._near(_HOPELESS[0]).nonzero().squeeze(1)
        while len(row := row[self._short()[row].any(1)]):
            column = self.bounds[row].argmin(1)
            self._cut_across(row, column)
            row = row[~self._short()[row, column]]

    def _cut_across(self, row: Tensor, column: Tensor) -> None:
        """Cut balls across where the best minorants fall, into more and more slabs.

        The larger number is for verdicts alone: a search for a radius would meet it in vain at
        every ball that is too large.
        """
        pairs = self._pairs(row, column, None)
        ceiling = torch.full_like(self.radii[row], torch.inf)
        point, _ = search(self.prover.rough, pairs, pairs.x0, SEARCH_STEPS, ceiling)
        for slabs in _SLABS if self.radius is not None else _SLABS[:1]:
            axis, radii = point - pairs.x0, self.radii[row]
            margin = slab_margins(self.prover, pairs, radii, axis, slabs)
            self._put(row, column, self._worth(margin, radii))
            left = self._short()[row, column]
            row, column, pairs, point = row[left], column[left], pairs.take(left), point[left]

    def _follow(self, ball: int, curvature: Tensor) -> None:
        """Follow the curvature along the paths from a ball's centre.

        Where that fails, the curvature of the whole ball can only help if it is small against the
        gradient (there would be no gap then); if so it is filled in for a search.
        """
        x, label, radius = self.x[ball], self.label[ball], self.radii[ball]
        room = None if self.box is None else self.box.room(x[None])
        place = Neighbourhood.of(self.prover, x, float(radius), room)
        for column in self.bounds[ball].argsort().tolist():
            if not self._short()[ball, column]:
                return
            margin = place.margin(label, self.targets[ball, column])
            self._put(ball, column, self._worth(margin, radius))
            if margin <= 0:
                break
        else:
            return
        rough = self.prover.rough
        single = x[None].to(rough.dtype), label[None], self.targets[ball, column][None]
        _, gradient = rough.margin_and_gradient(*single)
        bend = place.curvature(label, self.targets[ball, column])
        if bend * radius > _BENT * gradient.norm():
            return  # no radius or verdict for the image without this class
        if self.radius is not None:
            # What fails for one class leaves nothing to be gained from the others.
            alone = torch.full_like(curvature, torch.inf)
            alone[ball, column] = bend
            self._search(alone)
            if self._short()[ball, column]:
                return
        for other in self._short()[ball].nonzero().squeeze(1).tolist():
            curvature[ball, other] = place.curvature(label, self.targets[ball, other])

    def _worth(self, margin: Tensor, radii: Tensor) -> Tensor:
        """The bounds that margins of whole balls prove."""
        return margin if self.radius is not None else torch.where(margin > 0, radii, 0.0)

    def _put(self, row: Tensor | int, column: Tensor | int, value: Tensor) -> None:
        self.bounds[row, column] = torch.maximum(self.bounds[row, column], value)
