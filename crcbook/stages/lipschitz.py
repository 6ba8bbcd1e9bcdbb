"""The margin over a global Lipschitz constant: the first-order bound."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.certificate.question import Question
from crcbook.proof.lipschitz import lipschitz_bound
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.quadratic import Parabola


@dataclass(frozen=True)
class Lipschitz:
    """A stage of cones: parabolas with a Lipschitz constant for slope, and no curvature.

    Attributes:
        prover: the network, prepared for proofs.
        box: whether the adversary is confined to the table's box; a cone gains nothing by it.
    """

    prover: Prover
    box: bool = False
    method: str = "lipschitz"

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, None]:
        """Bounds of some entries.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, and no displacements.
        """
        margin, error = self.prover.margin_at(entries, entries.x)
        slope = lipschitz_bound(self.prover, entries.label, entries.target)
        slope = slope + self.prover.rounding.gap[0]
        cone = Parabola(margin - error, slope, torch.zeros_like(slope))
        bound = question.proves(entries, cone)
        constant = (slope == 0) & (cone.value > 0)
        everywhere = question.everywhere(torch.where(constant, cone.value, -torch.inf))
        return bound.fmax(everywhere), None
