"""Linear relaxations (CROWN; Zhang et al. 2018), layer by layer."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from crcbook.certificate.question import Question
from crcbook.proof.lines import Balls, Kind, Search, crown_margin, crown_radius
from crcbook.proof.prover import Entries, Prover


@dataclass(frozen=True)
class Crown:
    """A stage of lines around the activations, best where networks saturate.

    Most of its work is on the hidden layers, which all classes of an image share.

    Attributes:
        prover: the network, prepared for proofs.
        box: whether the adversary is confined to the table's box; the lines know of none.
    """

    prover: Prover
    box: bool = False
    method: str = "crown"

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, None]:
        """Bounds of some entries.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, and no displacements.
        """
        margins = self.prover, entries.x, entries.label, entries.target
        in_balls = partial(crown_margin, *margins, kind=self._kind)
        return question.ask(entries, in_balls, partial(self._radii, entries)), None

    @property
    def _kind(self) -> Kind:
        """By what the balls are bounded."""
        return Balls.of

    def _radii(self, entries: Entries, limit: Tensor) -> Tensor:
        """``(entries,)`` radii, which beyond their limits are good enough."""
        search = Search(smallest=True)
        return crown_radius(self.prover, entries.x, entries.label, entries.target, limit, search)
