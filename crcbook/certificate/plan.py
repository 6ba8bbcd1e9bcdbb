"""Which stages raise a table of bounds, and in which order: the cheap before the dear."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crcbook.certificate.adversaries import Limits
from crcbook.certificate.question import Margin, Question
from crcbook.certificate.results import CLOSE
from crcbook.certificate.table import Stage, Table, run
from crcbook.proof.curvature import downward_curvature
from crcbook.proof.parabolas import LARGEST
from crcbook.proof.prover import Prover
from crcbook.proof.sketches import Glance
from crcbook.stages.closed_form import ClosedForm
from crcbook.stages.dual import Dual
from crcbook.stages.lines import Crown
from crcbook.stages.lipschitz import Lipschitz
from crcbook.stages.local import Local
from crcbook.stages.parabolas import Parabolas
from crcbook.stages.single import Single

_REFINE_STEPS = 8  # of a search in float32 that goes on from one in few directions
_WORTH_A_SEARCH = 0.1  # of a radius: what a search must promise to go before the rivals
_CLOSER = 0.9  # of an adversary's distance: as CLOSE, for what costs more and proves more
# Classes times units times the order of a matrix. At 4e5 an image took five times what it does
# without parabolas, at 6.5e6 thirty-five times.
_CHEAP = 1e6
_RAISED = 1e-3  # of a radius: what a rival must raise it by to be asked for more


@dataclass(frozen=True)
class Plan:
    """The stages of a method.

    Attributes:
        prover: the network, prepared for proofs.
        glance: what is seen of a network at once.
        method: the name of a method, or ``"best"``.
        local: whether curvature in balls was asked for.
        confined: whether the adversary has to stay in a box.
    """

    prover: Prover
    glance: Glance
    method: str
    local: bool
    confined: bool

    @cached_property
    def stages(self) -> tuple[list[Stage], list[Stage]]:
        """What raises the bounds, the cheap before the dear; and then what works in balls."""
        prover = self.prover
        alone: dict[str, Callable[[Prover], Stage]]
        alone = {stage.method: stage for stage in (ClosedForm, Lipschitz, Crown, Parabolas)}
        if self.method in alone:
            return [alone[self.method](prover)], []
        single = Single.of(prover, self.glance.sketch)
        stages: list[Stage] = [Dual(prover)]
        if single is not None:
            stages = [single, Dual(prover, steps=_REFINE_STEPS)]
        return stages, [Local(prover)] if self.local else []

    @cached_property
    def boxed(self) -> tuple[list[Stage], list[Stage]]:
        """The same for an adversary who is confined to the box."""
        if not self.confined:
            return [], []
        return [Dual(self.prover, box=True)], [Local(self.prover, True)] if self.local else []

    @cached_property
    def rivals(self) -> list[Stage]:
        """What is tried where curvature leaves much open."""
        best = self.method == "best"
        return [Lipschitz(self.prover), Crown(self.prover)] if best else []

    @cached_property
    def dear(self) -> list[Stage]:
        """What is tried where all that leaves much open, too: quadratic relaxations.

        With one hidden layer, which is neither wide nor followed by many classes, a search for them
        costs a few times what the rest does. With more layers, where it costs tens of times as
        much, it is asked along with curvature in balls.
        """
        layers = self.prover.network.layers
        shape = layers[0].weight.shape
        work = self.prover.network.classes * shape[0] * min(shape)
        cheap = len(layers) == 2 and min(shape) <= LARGEST and work <= _CHEAP
        asked = self.method == "best" and (cheap or (self.local and len(layers) > 2))
        return [Parabolas(self.prover)] if asked else []

    def without_box(self, question: Question, table: Table) -> Limits:
        """Raise a table by everything that knows no box.

        Args:
            question: what its bounds are of.
            table: the table, without its box.

        Returns:
            What limits each of its images.
        """
        everywhere, in_balls = self.stages
        # Where no quadratic can be much better than the one at the input, the rivals come first.
        promising = self.promising(question, table, _WORTH_A_SEARCH)
        # Lines through the hidden layers serve all classes.
        run(question, table, everywhere, self.method in ("crown", "parabolas"), promising)
        limits = Limits.of(table)
        if self.rivals:
            limits = self._challenge(question, table, limits)
        left = self.promising(question, table)
        if left is not None and promising is not None:
            run(question, table, everywhere, only=left & ~promising)
        if self.dear:
            limits = Limits.of(table, limits)
            wide = limits.far(table, _CLOSER)
            run(question, table, self.dear, together=True, only=wide[:, None])
        run(question, table, in_balls, question.together)
        return limits

    def promising(self, question: Question, table: Table, least: float = 0.0) -> Tensor | None:
        """Where a search for the best quadratic is worth its price, among other methods.

        Args:
            question: what the table's bounds are of.
            table: the table.
            least: what a search must promise, as a share of a radius.

        Returns:
            ``(images, classes)`` bool; None where there are no other methods.
        """
        if not self.rivals:
            return None
        images = table.images
        pairs = torch.broadcast_tensors(images.y[:, None], images.order)
        curvature = downward_curvature(self.prover.network, *pairs)
        return question.promises(images.value, curvature, table.bound, least)

    def _challenge(self, question: Question, table: Table, limits: Limits) -> Limits:
        """Try the rivals where no adversary is near, and the limiting class can be raised."""
        limits = limits.nearer(table, limits.far(table, CLOSE))
        wide = limits.far(table, CLOSE)
        rows = wide.nonzero().squeeze(1)
        if not len(rows):
            return limits
        ball = Margin(limits.radius * (1 + _RAISED))
        index = rows * table.bound.shape[1] + limits.column[rows]
        entries = table.entries(index, torch.zeros_like(limits.radius))
        wide[rows] = torch.stack([rival(ball, entries)[0] > 0 for rival in self.rivals]).any(0)
        run(question, table, self.rivals, together=True, only=wide[:, None])
        return limits
