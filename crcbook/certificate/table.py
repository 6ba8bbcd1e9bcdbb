"""The table of lower bounds, one an image and other class, and the loop that raises them.

The table is the only thing that changes, and :meth:`Table.raise_to` takes the larger of two bounds:
no stage can lower one. So local curvature, a box and more methods can only help, and any stage may
be left out: answers shrink then, and stay true.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from crcbook.certificate.question import Question
from crcbook.deployed import farthest
from crcbook.networks import Network
from crcbook.proof.box import Box
from crcbook.proof.curvature import downward_curvature
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.quadratic import Parabola
from crcbook.proof.sketches import Glance


class Stage(Protocol):
    """What may raise bounds: a new one is a new file of :mod:`crcbook.stages`."""

    @property
    def method(self) -> str:
        """Which family of :data:`METHODS` it belongs to."""

    @property
    def box(self) -> bool:
        """Whether it asks for what a box leaves the adversary."""

    def __call__(self, question: Question, entries: Entries) -> tuple[Tensor, Tensor | None]:
        """Bounds of some entries.

        Args:
            question: what they are bounds of.
            entries: the margins.

        Returns:
            ``(entries,)`` bounds, and ``(entries, n)`` displacements to search on from, or None.
        """


# What bounds are told apart by: families. That of the dual is all that goes by curvature: the best
# quadratic and, in balls, slabs and paths too.
METHODS = ("dual", "closed-form", "lipschitz", "crown", "parabolas")
# Float64 values looked at together on a processor, 8 MB, so that they stay in its cache.
_CACHED_VALUES = 2**20


@dataclass(frozen=True)
class Images:
    """Inputs, and what one evaluation tells of them.

    Attributes:
        x: ``(images, n)`` float64.
        y: ``(images,)`` labels.
        order: ``(images, columns)`` the other classes, the one of the largest logit first.
        correct: ``(images,)`` bool: the label beats them all.
        z: ``(images, width)`` the first layer's preactivations, as computed.
        z_error: ``(images,)`` bounds of their error, in the l2 norm.
        gap: ``(images,)`` how far margins can be from those of the model.
        value: ``(images, columns)`` of the quadratics that touch the margins here, rounded down.
        slope: ``(images, columns)`` theirs, rounded upward.
        way: ``(images, columns, rank)`` the gradients, along the sketch's basis.
    """

    x: Tensor
    y: Tensor
    order: Tensor
    correct: Tensor
    z: Tensor
    z_error: Tensor
    gap: Tensor
    value: Tensor
    slope: Tensor
    way: Tensor

    @classmethod
    def of(cls, glance: Glance, x: Tensor, y: Tensor, runner_up_alone: bool) -> "Images":
        """Look at inputs.

        Args:
            glance: the network.
            x: ``(images, n)`` float64.
            y: ``(images,)`` labels.
            runner_up_alone: whether the other classes than the runner-up are left out.

        Returns:
            The images.
        """
        network = glance.prover.network
        size = block_size(network, network.classes, x.device)
        parts = zip(x.split(size), y.split(size), strict=True)
        looks = [vars(cls._of(glance, *part, runner_up_alone)).values() for part in parts]
        return cls(*(torch.cat(column) for column in zip(*looks, strict=True)))

    @classmethod
    def _of(cls, glance: Glance, x: Tensor, y: Tensor, runner_up_alone: bool) -> "Images":
        logits, z, slopes = glance.prover.network.logits_and_slopes(x)
        others = logits.scatter(1, y[:, None], -torch.inf)
        others = torch.where(others.isnan(), torch.inf, others)
        order = others.argsort(dim=1, descending=True, stable=True)
        order = order[order != y[:, None]].reshape(len(y), -1)
        own = logits.gather(1, y[:, None])
        correct = (own > others.gather(1, order[:, :1])).squeeze(1)
        order = order[:, :1] if runner_up_alone else order
        errors = (
            glance.prover.rounding.first_error(x),
            glance.prover.rounding.gap_at(x),
        )
        return cls(x, y, order, correct, z, *errors, *glance.look(x, y, order, logits, slopes))


@dataclass
class Table:
    """Lower bounds of the margins of some images, which can only rise.

    Attributes:
        prover: the network, prepared for proofs.
        images: the inputs.
        box: where the adversary must stay, for the stages that know of it; None for everywhere.
        bound: ``(images, columns)`` float64.
        start: ``(images * columns, n)`` displacements from which to search on.
        method: ``(images, columns)`` the position among :data:`METHODS` of what the bound is from.
    """

    prover: Prover
    images: Images
    box: Box | None
    bound: Tensor
    start: Tensor
    method: Tensor

    @classmethod
    def of(cls, prover: Prover, images: Images, box: Box | None) -> "Table":
        """A table in which nothing is proved yet.

        Args:
            prover: the network, prepared for proofs.
            images: the inputs.
            box: where the adversary must stay; None for everywhere.

        Returns:
            The table.
        """
        bound = torch.full_like(images.value, -torch.inf)
        start = images.x.new_zeros(bound.numel(), images.x.shape[1], dtype=prover.rough.dtype)
        return cls(prover, images, box, bound, start, torch.zeros_like(images.order))

    def glance(self, question: Question, glance: Glance) -> None:
        """Write what the quadratics at the inputs prove, and what holds over all of R^n.

        Args:
            question: what the bounds are of.
            glance: the network.
        """
        everything = torch.arange(self.bound.numel(), device=self.bound.device)
        entries = self._entries(everything, self.bound[:, 0], 0)
        parabola = Parabola(
            self.images.value.flatten(), self.images.slope.flatten(), entries.curvature
        )
        everywhere = question.everywhere(glance.lowest(entries.label, entries.target))
        found = question.proves(entries, parabola).fmax(everywhere)
        self.bound = found.reshape(self.bound.shape)

    def open(
        self,
        question: Question,
        columns: slice,
        first: bool,
        stage: Stage,
        only: Tensor | None = None,
    ) -> Iterator[Entries]:
        """The entries that a stage may raise, some at a time.

        Args:
            question: what the bounds are of.
            columns: those to look at.
            first: whether they are the runner-up's.
            stage: the stage.
            only: ``(images, columns)`` bool, the entries to look at; None for all.

        Yields:
            Entries whose bounds do not reach their goals.
        """
        goal = question.goal(self.bound, first)
        rows = self.images.correct if first else self.images.correct & question.asks(self.bound)
        is_open = torch.zeros_like(self.bound, dtype=torch.bool)
        is_open[:, columns] = rows[:, None] & (self.bound[:, columns] <= goal[:, None])
        is_open = is_open if only is None else is_open & only
        index = is_open.flatten().nonzero().squeeze(1)
        size = block_size(self.prover.network, 1, index.device)
        for part in index.split(size) if len(index) else ():
            yield self.entries(part, goal, stage.box)

    def entries(self, index: Tensor, goal: Tensor, box: bool = False) -> Entries:
        """Some of the table's entries.

        Args:
            index: ``(entries,)`` positions in the flat table.
            goal: ``(images,)`` bounds that are good enough.
            box: whether the adversary is confined to the table's box.

        Returns:
            The entries.
        """
        entries = self._entries(index, goal)
        return (
            replace(entries, allowed=self.box.take(entries.image).around(entries.x))
            if box and self.box is not None
            else entries
        )

    def _entries(self, index: Tensor, goal: Tensor, numbers: int | None = None) -> Entries:
        """Entries with that many of an input's numbers only, or with all."""
        images = self.images
        image = index // self.bound.shape[1]
        label, target = images.y[image], images.order.flatten()[index]
        curvature = downward_curvature(self.prover.network, label, target)
        x, z = (whole[:, :numbers].index_select(0, image) for whole in (images.x, images.z))
        start, way = (
            whole[:, :numbers].index_select(0, index)
            for whole in (self.start, images.way.flatten(0, 1))
        )
        errors = images.z_error[image], images.gap[image]
        columns = *errors, self.bound.flatten()[index], goal[image], start, way
        valid = torch.full_like(curvature, torch.inf)
        return Entries(index, image, label, target, curvature, valid, x, z, *columns)

    def of_runner_up(self) -> "Table":
        """The same bounds for the runner-up alone."""
        images = self.images
        names = "order", "value", "slope", "way"
        images = replace(images, **{name: getattr(images, name)[:, :1] for name in names})
        start = self.start.unflatten(0, self.bound.shape)[:, 0]
        columns = self.bound[:, :1], start, self.method[:, :1]
        return Table(self.prover, images, self.box, *columns)

    def raise_to(self, entries: Entries, bound: Tensor, start: Tensor | None, method: str) -> None:
        """Write bounds where they are larger than what is proved already.

        Args:
            entries: what the bounds are of.
            bound: ``(entries,)``; NaN counts as nothing.
            start: ``(entries, n)`` displacements from which to search on; None for those before.
            method: what found them.
        """
        index = entries.index
        if start is not None:
            self.start.index_copy_(0, index, start.to(self.start.dtype))
        raised = bound > self.bound.view(-1)[index]
        self.bound.view(-1)[index[raised]] = bound[raised]
        self.method.view(-1)[index[raised]] = METHODS.index(method)


def run(
    question: Question,
    table: Table,
    stages: Sequence[Stage],
    together: bool = False,
    only: Tensor | None = None,
) -> None:
    """Raise the bounds of a table, the runner-up's before the others', the cheap stages first.

    Args:
        question: what the bounds are of.
        table: the table.
        stages: called with a question and entries, each returns bounds and displacements, or None.
        together: raise all columns at a time.
        only: ``(images, columns)`` bool, the entries to raise; None for all.
    """
    for columns, first in _groups(table, together):
        for stage in stages:
            for entries in table.open(question, columns, first, stage, only):
                table.raise_to(entries, *stage(question, entries), stage.method)


def proved_radii(table: Table) -> tuple[Tensor, Tensor]:
    """What bounds of radii prove of each image.

    Args:
        table: with bounds of radii.

    Returns:
        ``(images,)`` radii, 0 where an image is misclassified, and the columns they are from.
    """
    radius, column = table.bound.min(dim=1)
    wrong = ~table.images.correct
    radius = radius.clamp(0, farthest(table.prover)).masked_fill(wrong, 0.0)
    return radius, column.masked_fill(wrong, 0)


def proved_margins(table: Table) -> tuple[Tensor, Tensor]:
    """What bounds of margins prove of each image.

    Args:
        table: with bounds of margins.

    Returns:
        ``(images,)`` margins, not positive where an image is misclassified, and the columns to
        doubt most: where one is not proved the first of these, else that of the margin.
    """
    doubt, margin = table.bound <= 0, table.bound.amin(1)
    column = torch.where(doubt.any(1), doubt.int().argmax(1), table.bound.argmin(1))
    return torch.where(table.images.correct, margin, margin.clamp(max=0.0)), column


def _groups(table: Table, together: bool) -> list[tuple[slice, bool]]:
    """The columns to raise at a time, and whether the runner-up's is among them."""
    if together or table.bound.shape[1] == 1:
        return [(slice(None), True)]
    return [(slice(0, 1), True), (slice(1, None), False)]


def block_size(network: Network, each: int, device: torch.device) -> int:
    """How many inputs to look at together.

    Args:
        network: the network.
        each: the evaluations that an input takes.
        device: where.

    Returns:
        At least 1; on a processor as many as fit its cache.
    """
    widest = max(layer.weight.shape[1] for layer in network.layers)
    cached = max(1, _CACHED_VALUES // (widest * each))
    return cached if device.type == "cpu" else 2**30
