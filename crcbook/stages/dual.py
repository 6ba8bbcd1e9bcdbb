"""The best quadratic: the convex dual of Singla & Feizi (2020), Theorems 1 and 2."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crcbook.certificate.question import Question
from crcbook.proof.arithmetic import INSIDE
from crcbook.proof.curvature import local_curvature
from crcbook.proof.intervals import Region
from crcbook.proof.prover import Entries, Evaluation, Prover
from crcbook.proof.quadratic import Quadratic
from crcbook.stages.search import search

SEARCH_STEPS, POLISH_STEPS = 100, 3  # at most; in the search's precision, then in float64
_AT_BOUNDARY = 1e-2  # of the quadratic's value: a margin this small has reached zero


@dataclass(frozen=True)
class Dual:
    """A stage that searches for the best point in float32 and proves at it in float64.

    Attributes:
        prover: the network, prepared for proofs.
        box: whether the adversary is confined to the table's box.
        steps: of the search, at most.
    """

    prover: Prover
    box: bool = False
    steps: int = SEARCH_STEPS
    method: str = "dual"

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, Tensor]:
        """Bounds of some entries.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds and ``(entries, n)`` displacements.
        """
        start = into_reach(entries, entries.start.double())
        d = search(self.prover.rough, question, entries, start, self.steps)
        d = into_reach(entries, d.double())
        quadratic, evaluation = self.prover.prove(entries, d)
        bound = question.proves(entries, quadratic)
        if question.polishes:
            # Where the search ended at the boundary there is no gap, and digits to be gained.
            near = at_boundary(quadratic, evaluation) & (bound <= entries.goal)
            near = near.nonzero().squeeze(1)
            self._polish(question, entries, d, bound, near)
        return bound, d

    def _polish(
        self, question: Question, entries: Entries, d: Tensor, bound: Tensor, rows: Tensor
    ) -> None:
        """Raise bounds by a few steps in float64."""
        if not len(rows):
            return
        few = entries.take(rows)
        better = search(self.prover.network, question, few, d[rows], POLISH_STEPS)
        better = into_reach(few, better)
        found = question.proves(few, self.prover.prove(few, better)[0])
        raised = found > bound[rows]
        bound[rows[raised]], d[rows[raised]] = found[raised], better[raised]


@dataclass(frozen=True)
class Sharp:
    """The same search with curvatures that take a few eigenvalue problems an entry.

    Attributes:
        prover: the network, prepared for proofs.
        solve: whose eigenvalue problems to solve: ``"entries"``, or ``"balls"``, which all margins
            of an image share, for looser curvatures.
        box: whether the adversary is confined to the table's box.
    """

    prover: Prover
    solve: str = "entries"
    box: bool = False
    method: str = "dual"

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, Tensor]:
        """Bounds of some entries, in their valid balls.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds and ``(entries, n)`` displacements.
        """
        k = curvature_in_reach(self.prover, entries, self.solve)
        return Dual(self.prover)(question, replace(entries, curvature=k))


def at_boundary(quadratic: Quadratic, evaluation: Evaluation) -> Tensor:
    """Whether margins have reached zero at the points of their quadratics, digits apart.

    Args:
        quadratic: below the margins.
        evaluation: what it is made of.

    Returns:
        ``(entries,)`` bool.
    """
    return evaluation.margin.abs() <= _AT_BOUNDARY * quadratic.value


def curvature_in_reach(prover: Prover, entries: Entries, solve: str = "nothing") -> Tensor:
    """The curvature in the balls that are the entries' reach.

    Args:
        prover: the network, prepared for proofs.
        entries: the margins, with finite radii to be valid in.
        solve: as in :func:`crcbook.proof.curvature.local_curvature`.

    Returns:
        ``(entries,)`` proved bounds.
    """
    # The margins of an image share what is found out about its ball.
    balls = torch.stack([entries.image.to(entries.valid), entries.valid])
    balls, item = balls.unique(dim=1, return_inverse=True)
    one = item.new_zeros(balls.shape[1])  # of its entries: they agree on what follows
    one = one.scatter(0, item, torch.arange(len(entries), device=item.device))
    allowed = None if entries.allowed is None else entries.allowed.take(one)
    region = Region(entries.x[one], entries.valid[one], allowed)
    pair = entries.label, entries.target
    return local_curvature(prover.rounding, region, item, *pair, solve)


def into_reach(entries: Entries, d: Tensor) -> Tensor:
    """Displacements that stay in the box, and where the curvatures of some margins are valid.

    Args:
        entries: the margins.
        d: ``(entries, n)`` float64.

    Returns:
        ``(entries, n)``.
    """
    d = d if entries.allowed is None else entries.allowed.clip(d)
    share = (INSIDE * entries.valid / d.norm(dim=1)).nan_to_num(nan=1.0).clamp(max=1)
    return torch.where((share < 1)[:, None], share[:, None] * d, d)
