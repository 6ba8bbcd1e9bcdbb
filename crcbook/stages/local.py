"""Bounds in balls around the inputs, raised by the curvature that the network has there."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crcbook.attacks import Aim, crossings, descend
from crcbook.certificate.question import Question
from crcbook.proof.curvature import downward_curvature
from crcbook.proof.prover import Entries, Prover
from crcbook.stages.dual import Dual, Sharp, curvature_in_reach
from crcbook.stages.paths import Paths
from crcbook.stages.slabs import Slabs

_DESCENT_STEPS, _CROSSING_STEPS = 4, 3  # of attacks that say where a proof would be in vain
_FEW_INPUTS = 128  # with more, where little is to be gained it is not tried
_InBalls = Dual | Slabs | Paths | Sharp
# Times the margin at the input: how far below 0 a bound can be that slabs, and paths, still mend.
# Chosen on networks of 2 to 4 layers for MNIST; a smaller share gives up sooner.
_HOPELESS = {Dual: torch.inf, Slabs: 4.0, Paths: 0.25, Sharp: 0.25}
_FLAT = 0.5  # of the curvature over R^n: where a ball's is below, following it gains little


@dataclass(frozen=True)
class Local:
    """A stage made of others, which work in balls.

    Attributes:
        prover: the network, prepared for proofs.
        box: whether the adversary is confined to the table's box.
    """

    prover: Prover
    box: bool = False
    method: str = "dual"

    @property
    def stages(self) -> tuple[_InBalls, ...]:
        """What is tried in a ball, in the order of its price."""
        dual, slabs, paths = Dual(self.prover), Slabs(self.prover), Paths(self.prover)
        depth, inputs = len(self.prover.network.layers), self.prover.network.inputs
        stages: tuple[_InBalls, ...] = (
            () if depth < 2 else (slabs,) if depth == 2 else (dual, slabs)
        )
        if self.box:  # slabs know of none, and were tried without
            stages = tuple(stage for stage in stages if stage is not slabs)
        return (
            stages
            if depth < 2 or (depth == 2 and inputs > _FEW_INPUTS)
            else (*stages, paths, Sharp(self.prover))
        )

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, None]:
        """Bounds of some entries.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, and no displacements.
        """
        bound = entries.bound.clone()
        if self.stages:
            question.in_balls(entries, bound, self)
        return bound, None

    def raise_bounds(self, question: Question, entries: Entries, radius: Tensor) -> Tensor:
        """Raise bounds by what is proved in balls.

        Args:
            question: what they are bounds of.
            entries: the margins, of several images.
            radius: ``(entries,)`` the balls' radii.

        Returns:
            ``(entries,)``, nowhere below the entries' own.
        """
        bound = entries.bound.clone()
        global_k = downward_curvature(self.prover.network, entries.label, entries.target)
        entries = replace(entries, valid=radius)
        k = curvature_in_reach(self.prover, entries)
        entries = replace(entries, curvature=k)
        for stage in self.stages:
            tried = question.short(entries, bound) & self._hopeful(stage, question, entries, bound)
            if isinstance(stage, Dual):
                tried &= k < global_k
            if isinstance(stage, Paths | Sharp):
                tried &= ~(k < _FLAT * global_k)
            rows = tried.nonzero().squeeze(1)
            if len(rows):
                found, _ = stage(question, replace(entries, bound=bound).take(rows))
                bound[rows] = bound[rows].fmax(found)
        return bound

    def _hopeful(
        self, stage: _InBalls, question: Question, entries: Entries, bound: Tensor
    ) -> Tensor:
        """Whether a bound is near enough to 0 for a stage to mend it, and no class worse."""
        if question.polishes or self.prover.network.inputs <= _FEW_INPUTS:
            return torch.ones_like(bound, dtype=torch.bool)
        margin, _ = self.prover.margin_at(entries, entries.x)
        hopeless = bound <= -_HOPELESS[type(stage)] * margin
        return ~torch.isin(entries.image, entries.image[hopeless])

    def adversaries(self, entries: Entries, radius: Tensor) -> Tensor:
        """Where an attack of a few steps finds an adversary in the balls.

        Args:
            entries: the margins.
            radius: ``(entries,)`` the balls' radii.

        Returns:
            ``(entries,)`` bool.
        """
        _, lowest = descend(Aim.of(self.prover, entries), radius, entries.x, _DESCENT_STEPS)
        return lowest <= 0

    def distances(self, entries: Entries) -> Tensor:
        """How far adversaries are that a few steps of an attack find.

        Args:
            entries: the margins.

        Returns:
            ``(entries,)`` l2 distances; NaN where none was found.
        """
        start = entries.x + entries.start.double()
        found = crossings(Aim.of(self.prover, entries), start, _CROSSING_STEPS)
        return (found - entries.x).norm(dim=1)
