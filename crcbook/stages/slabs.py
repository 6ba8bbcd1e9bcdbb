"""Balls cut into slabs, across the way in which a margin falls."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crcbook.certificate.question import Question, Radius
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.slabs import slab_margins
from crcbook.stages.dual import SEARCH_STEPS
from crcbook.stages.search import search


@dataclass(frozen=True)
class Slabs:
    """A stage that bounds margins slab by slab.

    Attributes:
        prover: the network, prepared for proofs.
        slabs: how many a ball is cut into; the next number where the ones before prove nothing.
        box: whether the adversary is confined to the table's box; slabs know of none.
    """

    prover: Prover
    slabs: tuple[int, ...] = (8, 32)
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
        # A best point for the radius shows which way the margin falls.
        goal = torch.full_like(entries.goal, torch.inf)
        whole = replace(entries, goal=goal)
        axis = search(
            self.prover.rough, Radius(), whole, torch.zeros_like(entries.start), SEARCH_STEPS
        )
        left = torch.arange(len(bound), device=bound.device)
        for slabs in self.slabs if question.thorough else self.slabs[:1]:
            few = entries.take(left)
            margin = slab_margins(self.prover, few, axis[left].double(), slabs)
            bound[left] = question.worth(few, margin)
            left = left[question.short(few, bound[left])]
            if not len(left):
                break
        return bound


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
