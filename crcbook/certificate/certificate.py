"""Certified l2 radii and verdicts, against every class.

The mathematics is in :mod:`crcbook.proof`; here inputs are checked, a table of bounds is raised by
the stages that were asked for, and read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from crcbook.attacks import crossings
from crcbook.certificate.question import Margin, Question, Radius
from crcbook.certificate.table import METHODS, Images, Stage, Table, run
from crcbook.checks import as_box, as_classes, as_inputs, as_radius, readable
from crcbook.deployed import FARTHEST, DeployedRounding, deployed_prover
from crcbook.networks import read_network
from crcbook.proof.arithmetic import OUTWARD
from crcbook.proof.box import Box, clip
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.sketches import Glance
from crcbook.stages.closed_form import ClosedForm
from crcbook.stages.dual import Dual, at_boundary, into_reach
from crcbook.stages.lines import Lines
from crcbook.stages.lipschitz import Lipschitz
from crcbook.stages.local import Local
from crcbook.stages.single import Single

EXACT = 1e-6  # of the radius: how close an adversary must be for it to be the distance
_REFINE_STEPS = 8  # of a search in float32 that goes on from one in few directions
_CROSSING_STEPS = 3  # of the attack that looks for the nearest adversary
_CHUNK_VALUES = 2**23  # of an input's way through a network, for all classes: 64 MB in float64


@dataclass(frozen=True)
class Certificate:
    """Certified radii of a batch.

    Attributes:
        radius: ``(batch,)`` float64, l2, in the units of the input: no point closer than this is
            classified differently. 0 where the image is misclassified, infinity where no point at
            all can be.
        target: ``(batch,)`` int64, the class whose boundary limits the radius; the predicted class
            where the image is misclassified.
        exact: ``(batch,)`` bool: an adversarial point within ``(1 + 1e-6) * radius`` is known and
            proved to be one, so the radius is the distance to the boundary.
        nearest: ``(batch, n)`` float64, the closest adversarial point proved; NaN where none was.
        method: for each input, the method whose bound won.
        targets: ``"all"``, or ``"runner-up"`` where only that class was considered.
    """

    radius: Tensor
    target: Tensor
    exact: Tensor
    nearest: Tensor
    method: tuple[str, ...]
    targets: str


@dataclass(frozen=True)
class Verdict:
    """Whether the label is certain in a ball of a fixed radius.

    Attributes:
        robust: ``(batch,)`` bool: proved for every point of the ball. False is no proof of the
            opposite.
        margin: ``(batch,)`` float64 lower bound of the smallest margin in the ball.
        target: ``(batch,)`` int64, the class that is in the way: of those not proved the one with
            the largest logit; where all are proved, the class with the smallest margin.
        targets: ``"all"``, or ``"runner-up"`` where only that class was considered.
    """

    robust: Tensor
    margin: Tensor
    target: Tensor
    targets: str


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targets: str = "all",
    box: tuple | None = None,
    curvature: str = "global",
    method: str = "dual",
    deployed: str | None = None,
    progress: bool = False,
) -> Certificate:
    r"""Certified l2 radii: how far each input can move before its label can change.

    Proved for the network in real arithmetic with its stored weights; every evaluation has its
    rounding error subtracted (:mod:`crcbook.proof.rounding`). The radius is the largest one found
    for each class, and the smallest of these over the classes.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        targets: ``"all"`` other classes, or only the ``"runner-up"`` (the second largest logit),
            which is no guarantee against the others.
        box: the lowest and the highest valid value of an input, numbers or tensors of an input's
            shape, such as ``(0.0, 1.0)``: the adversary must stay inside. None for no box.
        curvature: ``"global"``, over all of R^n, or ``"local"``: over balls around the inputs,
            for those that the global bound leaves short of the nearest adversarial point found.
            Local bounds are never smaller and take an eigenvalue problem an input and class each.
        method: ``"dual"``, the best quadratic found; ``"closed-form"``, the one at the input
            (Entesari et al. 2024); ``"lipschitz"``, the margin over a global Lipschitz constant;
            ``"crown"``, linear relaxations (Zhang et al. 2018), slow; or ``"best"`` of them all.
        deployed: None for the network in real arithmetic; ``"float32"`` for the program that torch
            runs, whatever the order of its sums: no float32 input closer than the radius is
            classified differently by it (:mod:`crcbook.deployed`). For a Sequential of Flatten,
            Linear and activations; in float32 products that no setting shortens.
        progress: show a progress bar.

    Returns:
        The radii, in the units of the input, with the classes and points that limit them.

    Raises:
        TypeError: for a model or tensors of the wrong kind.
        ValueError: for a layer that cannot be certified, a wrong shape or range, NaN or infinity,
            an unknown option, or a box or local curvature with a method other than ``"dual"`` and
            ``"best"``.
    """
    problem = _Problem.of(model, x, y, targets, box, curvature, method, deployed)
    parts = [problem.certify(chunk) for chunk in problem.chunks(progress, "certify")]
    *columns, won = zip(*parts, strict=True)
    methods = tuple(name for names in won for name in names)
    radius, target, exact, nearest = map(torch.cat, columns)
    return Certificate(radius, target, exact, nearest, methods, targets)


def verify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float,
    targets: str = "all",
    box: tuple | None = None,
    curvature: str = "global",
    method: str = "dual",
    deployed: str | None = None,
    progress: bool = False,
) -> Verdict:
    """Decide whether each label is certain in the l2 ball of a given radius.

    The search for a class stops as soon as its margin is proved positive, and no other class is
    searched where the runner-up's is not: ``margin`` is a valid lower bound but not the best one.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        radius: the l2 radius of the ball, in the units of the input.
        targets: ``"all"`` or ``"runner-up"``, as in :func:`certify`.
        box: the valid inputs, as in :func:`certify`.
        curvature: ``"global"``, or ``"local"`` over the ball for margins the global bound leaves
            undecided.
        method: as in :func:`certify`.
        deployed: as in :func:`certify`.
        progress: show a progress bar.

    Returns:
        The verdicts.

    Raises:
        TypeError: for a model or tensors of the wrong kind.
        ValueError: for a layer that cannot be certified, a wrong shape or range, NaN or infinity,
            or an unknown option.
    """
    problem = _Problem.of(model, x, y, targets, box, curvature, method, deployed)
    radius = as_radius(radius)
    if radius > problem.farthest:
        raise ValueError(f"a float32 program is verified up to {FARTHEST:g}; got {radius:g}")
    parts = [problem.verify(chunk, radius) for chunk in problem.chunks(progress, "verify")]
    margin, target = (torch.cat(column) for column in zip(*parts, strict=True))
    return Verdict(margin > 0, margin, target, targets)


def verify_by_kind(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float,
    box: tuple | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Which labels each kind of certificate proves in the l2 ball of a given radius.

    The kinds go on from each other's bounds, in one table: asking for all of them takes little more
    than asking for the last.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        radius: the l2 radius of the ball, in the units of the input.
        box: the valid inputs, as in :func:`certify`; None for none.
        progress: show a progress bar.

    Returns:
        ``(batch,)`` bool each, none of which is below the one before: ``"global"`` and ``"local"``
        curvature, and with a box ``"global in box"`` and ``"local in box"``.
    """
    problem = _Problem.of(model, x, y, "all", box, "local", "dual")
    parts = [problem.kinds(chunk, as_radius(radius)) for chunk in problem.chunks(progress, "kinds")]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class _Problem:
    """A checked batch, the network it belongs to, and what is asked for."""

    prover: Prover
    glance: Glance
    x: Tensor
    y: Tensor
    targets: str
    box: Box | None
    local: bool
    method: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        targets: str,
        box: tuple | None,
        curvature: str,
        method: str,
        deployed: str | None = None,
    ) -> "_Problem":
        network = read_network(model, readable(x))
        x = as_inputs(x, network)
        y = as_classes("y", y, network, batch=len(x))
        for name, value, choices in (
            ("targets", targets, ("all", "runner-up")),
            ("curvature", curvature, ("global", "local")),
            ("method", method, (*METHODS, "best")),
            ("deployed", deployed, (None, "float32")),
        ):
            if value not in choices:
                known = ", ".join(map(str, choices))
                raise ValueError(f"{name} must be one of {known}; got {value!r}")
        local = curvature == "local"
        if method in METHODS[1:] and (box is not None or local):
            raise ValueError(f"method {method!r} knows neither a box nor local curvature")
        prover = deployed_prover(model, network) if deployed else Prover.of(network)
        return cls(prover, Glance.of(prover), x, y, targets, as_box(box, x), local, method)

    @property
    def farthest(self) -> float:
        """The distance from an input up to which bounds hold."""
        program = isinstance(self.prover.rounding, DeployedRounding)
        return FARTHEST if program else torch.inf

    @cached_property
    def stages(self) -> tuple[list[Stage], list[Stage]]:
        """What raises the bounds, the cheap before the dear; and then what works in balls."""
        prover, boxed = self.prover, self.box is not None
        alone: dict[str, Callable[[Prover], Stage]]
        alone = {"closed-form": ClosedForm, "lipschitz": Lipschitz, "crown": Lines}
        if self.method in alone:
            return [alone[self.method](prover)], []
        single = Single.of(prover, self.glance.sketch)
        stages: list[Stage] = [Dual(prover)]
        if single is not None:
            stages = [single, Dual(prover, steps=_REFINE_STEPS)]
        stages += [Dual(prover, box=True)] if boxed else []
        stages += [Lipschitz(prover), Lines(prover)] if self.method == "best" else []
        local: list[Stage] = [Local(prover)] if self.local else []
        return stages, local + ([Local(prover, self.box)] if self.local and boxed else [])

    def chunks(self, progress: bool, description: str) -> Iterator[slice]:
        """Slices of a fixed size, so that memory is bounded."""
        network = self.prover.network
        widest = max(layer.weight.shape[1] for layer in network.layers)
        size = max(1, _CHUNK_VALUES // (widest * network.classes))
        starts = range(0, len(self.x), size)
        for start in tqdm(starts, desc=description, disable=not progress, unit="chunk"):
            yield slice(start, start + size)

    def table(self, chunk: slice, question_of: Callable[[Tensor], Question]) -> Table:
        """The bounds of some inputs, as the stages leave them."""
        x, y = self.x[chunk], self.y[chunk]
        images = Images.of(self.glance, x, y, self.targets == "runner-up")
        table, question = Table.of(self.prover, images, self.box), question_of(x)
        if self.method in ("dual", "best"):
            table.glance(question, self.glance)
        everywhere, in_balls = self.stages
        run(question, table, everywhere)
        run(question, table, in_balls, question.together)
        return table

    def certify(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
        """The columns of a certificate."""
        table = self.table(chunk, lambda x: Radius())
        images, rows = table.images, torch.arange(len(table.bound), device=table.bound.device)
        radius, column = table.bound.min(dim=1)
        radius = radius.clamp(0, self.farthest).masked_fill(~images.correct, 0.0)
        column = column.masked_fill(~images.correct, 0)
        limiting = rows * table.bound.shape[1] + column
        entries = table.entries(limiting, torch.full_like(radius, torch.inf), self.box is not None)
        nearest = self._nearest(entries, images.correct, radius)
        exact = self._reached(entries, nearest, radius)
        exact |= ~images.correct & nearest.isfinite().all(1)
        method = table.method.flatten()[limiting]
        if self.method != "best":
            method = torch.full_like(method, METHODS.index(self.method))
        method = [METHODS[number] for number in method.tolist()]
        return radius, entries.target, exact, nearest, method

    def verify(self, chunk: slice, radius: float) -> tuple[Tensor, Tensor]:
        """The columns of a verdict."""
        table = self.table(chunk, lambda x: Margin(torch.full_like(x[:, 0], radius), self.local))
        bound, correct = table.bound, table.images.correct
        doubt = bound <= 0
        position = torch.where(doubt.any(1), doubt.int().argmax(1), bound.argmin(1))
        margin = bound.amin(1)
        margin = torch.where(correct, margin, margin.clamp(max=0.0))
        return margin, table.images.order.gather(1, position[:, None]).squeeze(1)

    def kinds(self, chunk: slice, radius: float) -> dict[str, Tensor]:
        """What each kind of certificate proves."""
        x = self.x[chunk]
        question = Margin(torch.full_like(x[:, 0], radius), patient=True)
        images = Images.of(self.glance, x, self.y[chunk], False)
        table = Table.of(self.prover, images, self.box)
        table.glance(question, self.glance)
        everywhere, in_balls = self.stages
        found = {}
        for boxed in (False, True)[: 1 + (self.box is not None)]:
            for name, stages, together in (
                ("global", everywhere, False), ("local", in_balls, question.together),
            ):  # fmt: skip
                run(question, table, [s for s in stages if s.box is boxed], together)
                proved = images.correct & (table.bound > 0).all(1)
                found[f"{name} in box" if boxed else name] = proved
        return found

    def _nearest(self, entries: Entries, correct: Tensor, radius: Tensor) -> Tensor:
        """Adversarial points, NaN where none is proved; a misclassified image is its own.

        Overshooting the radius by a hair, where the quadratic falls fastest, finds the nearest one
        wherever the radius is exact. For the others it is where an attack starts.
        """
        quadratic, evaluation = self.prover.prove(
            entries, into_reach(entries, entries.start.double())
        )
        way = quadratic.nearest(quadratic.radius())
        point = clip(self.box, entries.x + (1 + 0.9 * EXACT) * way)
        point = torch.where(correct[:, None], point, entries.x)
        close = (point - entries.x).norm(dim=1) <= radius * (1 + EXACT)
        hit = ~correct | (close & at_boundary(quadratic, evaluation))
        likely = hit.nonzero().squeeze(1)
        hit[likely] = self.prover.is_adversarial(entries.take(likely), point[likely])
        missed = (correct & ~hit & radius.isfinite()).nonzero().squeeze(1)
        point[missed] = self._adversaries(entries.take(missed), point[missed])
        hit[missed] = True  # or NaN
        return point.masked_fill((~hit | radius.isinf())[:, None], torch.nan)

    def _adversaries(self, entries: Entries, start: Tensor) -> Tensor:
        """Points proved to be adversarial, as near as an attack gets; NaN where it finds none."""
        begin = entries.z if len(self.prover.network.layers) > 1 else None
        found = crossings(
            self.prover.network, entries.x, entries.label, entries.target, start, _CROSSING_STEPS,
            self.box, self.prover.rough, begin,
        )  # fmt: skip
        # Across the boundary, beyond any doubt.
        found = clip(self.box, found + 0.5 * EXACT * (found - entries.x))
        proved = self.prover.is_adversarial(entries, found)
        return torch.where(proved[:, None], found, torch.nan)

    def _reached(self, entries: Entries, nearest: Tensor, radius: Tensor) -> Tensor:
        """Whether the nearest point known is adversarial for the target and at the radius."""
        reached = (nearest - entries.x).norm(dim=1) * OUTWARD <= radius * (1 + EXACT)
        reached &= radius > 0
        rows = reached.nonzero().squeeze(1)
        reached[rows] = self.prover.is_adversarial(entries.take(rows), nearest[rows])
        return reached
