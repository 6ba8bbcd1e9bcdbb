"""Bounds in balls around the inputs, raised by the curvature that the network has there."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crcbook.attacks import Aim, crossings, descend
from crcbook.certificate.question import Question
from crcbook.certificate.table import Stage
from crcbook.proof.curvature import downward_curvature
from crcbook.proof.prover import Entries, Prover
from crcbook.stages.dual import Dual, Sharp, curvature_in_reach
from crcbook.stages.paths import Paths
from crcbook.stages.slabs import Slabs

_DESCENT_STEPS, _CROSSING_STEPS = 4, 3  # of attacks that say where a proof would be in vain
_FEW_INPUTS = 128  # with more, where little is to be gained it is not tried
_FLAT = 0.5  # of the curvature over R^n: where a ball's is below, following it gains little


@dataclass(frozen=True)
class Attempt:
    """A stage that works in balls, and where it is worth its price.

    What counts as hopeless was chosen on networks of 2 to 4 layers for MNIST; a smaller number
    gives up sooner.

    Attributes:
        stage: raises bounds of entries with valid balls.
        hopeless: times the margin at the input, how far below 0 a bound is not mended any more.
        least: of the curvature over R^n; where a ball's is below, there is little to gain.
        most: of the curvature over R^n; where a ball's is not below, there is nothing to gain.
    """

    stage: Stage
    hopeless: float
    least: float = 0.0
    most: float = torch.inf

    def tries(self, k: Tensor, global_k: Tensor) -> Tensor:
        """Whether curvatures in balls leave something to gain.

        Args:
            k: ``(entries,)`` those in the balls.
            global_k: ``(entries,)`` those over R^n.

        Returns:
            ``(entries,)`` bool.
        """
        below = k < self.most * global_k if self.most < torch.inf else torch.ones_like(k).bool()
        return below & ~(k < self.least * global_k)


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
    def attempts(self) -> list[Attempt]:
        """What is tried in a ball, in the order of its price."""
        prover, network = self.prover, self.prover.network
        depth, many = len(network.layers), network.inputs > _FEW_INPUTS
        found = [Attempt(Dual(prover), torch.inf, most=1.0)] if depth > 2 else []
        if depth > 2 and many:
            # Where nothing cheaper says how flat a ball is, no bound so far says what this can do.
            found.append(Attempt(Sharp(prover, "balls"), torch.inf, least=_FLAT))
        if depth > 1 and not self.box:  # slabs know of none, and were tried without
            found.append(Attempt(Slabs(prover), 4.0))
        if depth > 2 or (depth > 1 and not many):
            dear = Paths(prover), Sharp(prover)
            found += [Attempt(stage, 0.25, least=_FLAT) for stage in dear]
        return found

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, None]:
        """Bounds of some entries.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, and no displacements.
        """
        bound = entries.bound.clone()
        if self.attempts:
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
        entries, margin = replace(entries, curvature=k), self._margin(question, entries)
        for attempt in self.attempts:
            tried = question.short(entries, bound) & attempt.tries(k, global_k)
            # What is hopeless for one class leaves nothing to gain from the others of its image.
            hopeless = bound < -attempt.hopeless * margin
            tried &= ~torch.isin(entries.image, entries.image[hopeless])
            rows = tried.nonzero().squeeze(1)
            if len(rows):
                found, _ = attempt.stage(question, replace(entries, bound=bound).take(rows))
                bound[rows] = bound[rows].fmax(found)
        return bound

    def _margin(self, question: Question, entries: Entries) -> Tensor:
        """The margins at the inputs, in which hopes are counted; infinite to give none up."""
        if question.polishes or self.prover.network.inputs <= _FEW_INPUTS:
            return torch.full_like(entries.bound, torch.inf)
        return self.prover.margin_at(entries, entries.x)[0]

    def adversaries(self, entries: Entries, radius: Tensor) -> Tensor:
        """Where an attack of a few steps finds an adversary in the balls.

        Args:
            entries: the margins.
            radius: ``(entries,)`` the balls' radii.

        Returns:
            ``(entries,)`` bool.
        """
        aim = Aim.of(self.prover, entries)
        _, lowest = descend(aim, radius, entries.x, _DESCENT_STEPS, decide=True)
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
