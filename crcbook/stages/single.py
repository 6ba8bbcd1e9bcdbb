r"""Few digits for margins that are far from deciding anything.

Most classes lie well beyond the nearest one, and to say so a few steps and a proof in float32 are
enough. The first layer's largest singular directions V hold most of a gradient: searches begin
there, at :math:`d = Vu`, where a step takes a third of the time. What V leaves out can make a point
worse, never a bound false.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.acceleration import Acceleration
from crcbook.certificate.question import Question
from crcbook.proof.arithmetic import SINGLE
from crcbook.proof.prover import Change, Entries, Prover
from crcbook.proof.sketches import NormSketch, Reduced
from crcbook.stages.search import next_point, search

_STEPS = 3  # full ones of the search in few directions; the next stage goes on
_FIRST = 0.8  # of the longest step, 1/k: full ones overshoot
_LEAST_SHRINK = 0.3  # near the end of the sketch, where its coordinates mean little


@dataclass(frozen=True)
class Single:
    """A stage of three steps in float32, each proved.

    Attributes:
        prover: the network, prepared for proofs; it has a float32 copy.
        reduced: the float32 network as a function of u.
        shrink: ``(rank,)`` by how much the sketch's coordinates are shorter than those of V.
    """

    prover: Prover
    reduced: Reduced
    shrink: Tensor
    box: bool = False
    method: str = "dual"

    @classmethod
    def of(cls, prover: Prover, sketch: NormSketch | None) -> "Single | None":
        """The stage of a network.

        Args:
            prover: the network, prepared for proofs.
            sketch: of its first layer's weight.

        Returns:
            The stage; None where there is no sketch, or float32 is not what it should be.
        """
        if sketch is None or prover.single is None:
            return None
        shrink = sketch.shrink.float().clamp(min=_LEAST_SHRINK)
        return cls(prover, Reduced.of(prover), shrink)

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, Tensor]:
        """Bounds of some entries.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, minus infinity where nothing was proved, and ``(entries, n)``
            displacements to search on from.
        """
        u = self._first(question, entries).nan_to_num(0.0, 0.0, 0.0)
        if entries.goal.isinf().all():  # nothing is good enough: only a point is wanted
            u = search(self.reduced.network, question, entries, u, 100, rough=True)
            return torch.full_like(entries.bound, -torch.inf), self.reduced.displaced(u)[0]
        d, known = self.reduced.displaced(u)
        change: Change | None = known
        entries = entries.to(torch.float32)
        bound, last = torch.full_like(entries.bound, -torch.inf), torch.zeros_like(d)
        rows, acceleration = torch.arange(len(bound), device=bound.device), Acceleration()
        for _ in range(_STEPS):
            quadratic, evaluation = self.prover.prove(entries, d, SINGLE, change)
            found = question.proves(entries, quadratic)
            bound[rows] = bound[rows].maximum(found)
            move = next_point(question, entries, evaluation) - d
            d = (d + acceleration.step(d, move)).nan_to_num(0.0, 0.0, 0.0)
            last[rows] = d
            short = (found <= entries.goal).nonzero().squeeze(1)
            rows, entries, d = rows[short], entries.take(short), d.index_select(0, short)
            acceleration, change = acceleration.take(short), None
        return bound, last

    def _first(self, question: Question, entries: Entries) -> Tensor:
        """The first point: against the gradient at the input, as far as the question reaches."""
        way = entries.way.float() / self.shrink
        eta = question.reach(entries) / way.norm(dim=1)
        return -eta.fmin(_FIRST / entries.curvature).float()[:, None] * way
