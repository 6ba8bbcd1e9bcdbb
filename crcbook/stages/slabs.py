"""Balls cut into slabs, across the way in which a margin falls."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crcbook.attacks import Aim, steps_to_boundary
from crcbook.certificate.question import Question, Radius
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.slabs import slab_margins
from crcbook.stages.dual import SEARCH_STEPS
from crcbook.stages.search import search

_ATTACK_STEPS = 8  # towards an adversary: enough on MNIST, and no proof rests on them


@dataclass(frozen=True)
class Slabs:
    """A stage that bounds margins slab by slab.

    Of the margins of 155 images of MNIST that parabolas left open, in a trained network, the first
    two numbers of slabs prove 83, with the third 88; cut towards the adversary alone they are 76.

    Attributes:
        prover: the network, prepared for proofs.
        slabs: across which way a ball is cut, and into how many; the next where the ones before
            prove nothing. ``"point"`` is the way to the point of the best parabola for a radius,
            ``"adversary"`` that to a near adversarial point.
        box: whether the adversary is confined to the table's box; slabs know of none.
    """

    prover: Prover
    slabs: tuple[tuple[str, int], ...] = (("point", 8), ("point", 32), ("adversary", 32))
    box: bool = False
    method: str = "dual"

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, None]:
        """Bounds of some entries, in their valid balls.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, minus infinity where nothing was proved, as in a box, and no
            displacements.
        """
        bound = torch.full_like(entries.bound, -torch.inf)
        if entries.allowed is not None:  # their curvatures need not hold in the whole balls
            return bound, None
        for rows in worst_first(entries, bound, question):
            few = entries.take(rows)
            bound[rows] = self._cut(question, few)
        return bound, None

    def _cut(self, question: Question, entries: Entries) -> Tensor:
        bound = torch.full_like(entries.bound, -torch.inf)
        left = torch.arange(len(bound), device=bound.device)
        axes: dict[str, Tensor] = {}
        for way, slabs in self.slabs if question.thorough else self.slabs[:1]:
            few = entries.take(left)
            if way not in axes:
                axes[way] = torch.zeros_like(entries.x)
                axes[way][left] = self._axis(way, few)
            margin = slab_margins(self.prover, few, axes[way][left], slabs)
            bound[left] = question.worth(few, margin)
            left = left[question.short(few, bound[left])]
            if not len(left):
                break
        return bound

    def _axis(self, way: str, entries: Entries) -> Tensor:
        """Displacements across which to cut, on which no proof rests."""
        if way == "point":
            whole = replace(entries, goal=torch.full_like(entries.goal, torch.inf))
            start = torch.zeros_like(entries.start)
            return search(self.prover.rough, Radius(), whole, start, SEARCH_STEPS).double()
        start = entries.x + entries.start.double()
        return steps_to_boundary(Aim.of(self.prover, entries), start, _ATTACK_STEPS) - entries.x


def worst_first(entries: Entries, bound: Tensor, question: Question) -> Iterator[Tensor]:
    """Rounds of entries, of each image the worst one that is left.

    What fails for one class leaves nothing to be gained from the others of its image, so these are
    left out.

    Args:
        entries: the margins.
        bound: ``(entries,)`` what is proved of them, written between the rounds.
        question: what they are bounds of.

    Yields:
        ``(round,)`` positions.
    """
    left = entries.bound.argsort(stable=True)
    while len(left):
        rows = left[_first_of_each(entries.image[left])]
        yield rows
        failed = question.short(entries.take(rows), bound[rows])
        left = left[torch.isin(left, rows, invert=True)]
        left = left[torch.isin(entries.image[left], entries.image[rows[failed]], invert=True)]


def _first_of_each(values: Tensor) -> Tensor:
    """Where each of the distinct values occurs first."""
    distinct, place = values.unique(return_inverse=True)
    order = torch.arange(len(values), device=values.device)
    first = order.new_full((len(distinct),), len(values))
    return first.scatter_reduce(0, place, order, "amin")
