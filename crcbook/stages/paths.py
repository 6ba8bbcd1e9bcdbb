"""The curvature followed along the paths from the centre of a ball: a trust-region problem."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.certificate.question import Question
from crcbook.proof.paths import Neighbourhood
from crcbook.proof.prover import Entries, Prover


@dataclass(frozen=True)
class Paths:
    """A stage that solves a trust-region problem an entry.

    Attributes:
        prover: the network, prepared for proofs.
        box: whether the adversary is confined to the table's box.
    """

    prover: Prover
    box: bool = False
    method: str = "dual"

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, None]:
        """Bounds of some entries, in their valid balls.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, minus infinity where nothing was proved, and no
            displacements.
        """
        bound = torch.full_like(entries.bound, -torch.inf)
        for image in entries.image.unique().tolist():
            rows = (entries.image == image).nonzero().squeeze(1)
            rows = rows[entries.bound[rows].argsort()]
            self._follow(question, entries, rows, bound)
        return bound, None

    def _follow(self, question: Question, entries: Entries, rows: Tensor, bound: Tensor) -> None:
        """Bound the margins of an image, the worst one first: what fails for it ends the rest."""
        one = entries.take(rows[:1])
        place = Neighbourhood.of(self.prover, one.x[0], float(one.valid[0]), one.allowed)
        for row in rows.tolist():
            entry = entries.take(torch.tensor([row], device=rows.device))
            bound[row] = question.worth(entry, place.margin(entry)[None])[0]
            if question.short(entry, bound[row : row + 1])[0]:
                return
