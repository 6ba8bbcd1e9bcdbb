"""Parabolas below the first layer's units, lines around those above."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from crcbook.certificate.question import Question
from crcbook.proof.lines import Search, crown_margin, crown_radius
from crcbook.proof.parabolas import BentBalls
from crcbook.proof.prover import Entries, Prover

_TOLERANCE = 1e-2  # of a radius: each trial bounds every layer anew


@dataclass(frozen=True)
class Parabolas:
    """A stage of quadratic relaxations, which goes on from the radii that are proved.

    Attributes:
        prover: the network, prepared for proofs.
        box: whether the adversary is confined to the table's box; the parabolas know of none.
    """

    prover: Prover
    box: bool = False
    method: str = "parabolas"

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, None]:
        """Bounds of some entries.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, and no displacements.
        """
        search = Search(BentBalls, True, _TOLERANCE, entries.bound)
        margins = self.prover, entries.x, entries.label, entries.target
        in_balls = partial(crown_margin, *margins, kind=BentBalls)
        return question.ask(entries, in_balls, partial(crown_radius, *margins, search=search)), None
