"""The quadratic that touches a margin at the input itself (Entesari et al. 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.certificate.question import Question
from crcbook.proof.prover import Entries, Prover


@dataclass(frozen=True)
class ClosedForm:
    """A stage that searches for nothing: its point is the input.

    Attributes:
        prover: the network, prepared for proofs.
        box: whether the adversary is confined to the table's box.
    """

    prover: Prover
    box: bool = False
    method: str = "closed-form"

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, None]:
        """Bounds of some entries.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, and no displacements.
        """
        quadratic, _ = self.prover.prove(entries, torch.zeros_like(entries.x))
        return question.proves(entries, quadratic), None
