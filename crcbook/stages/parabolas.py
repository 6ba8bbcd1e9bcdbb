"""Parabolas below the first layer's units, lines around those above."""

from dataclasses import dataclass

from crcbook.proof.lines import Search
from crcbook.proof.parabolas import BentBalls
from crcbook.proof.prover import Entries
from crcbook.stages.lines import Crown

_TOLERANCE = 1e-2  # of a radius: each trial bounds every layer anew


@dataclass(frozen=True)
class Parabolas(Crown):
    """A stage of quadratic relaxations, which goes on from the radii that are proved.

    Attributes:
        prover: the network, prepared for proofs.
        box: whether the adversary is confined to the table's box; the parabolas know of none.
    """

    method: str = "parabolas"

    def _how(self, entries: Entries) -> Search:
        return Search(BentBalls, True, _TOLERANCE, entries.bound)
