"""Certified l2 radii and verdicts, against every class.

The mathematics is in :mod:`crcbook.proof`; here inputs are checked, a table of bounds is raised by
the stages that were asked for, and read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from crcbook.certificate.adversaries import Attacked, Limits, Rounding, distance_bound
from crcbook.certificate.plan import Plan
from crcbook.certificate.question import Margin, Question, Radius
from crcbook.certificate.results import CLOSE, Certificate, Verdict, hint, untried
from crcbook.certificate.table import METHODS, Images, Table, proved_margins, run
from crcbook.checks import Items, as_box, as_labels, as_radii, read_items
from crcbook.deployed import FARTHEST, deployed_prover, farthest
from crcbook.proof.box import Box
from crcbook.proof.prover import Prover
from crcbook.proof.sketches import Glance

_CHUNK_VALUES = 2**23  # of an input's way through a network, for all classes: 64 MB in float64


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    targets: str = "all",
    box: tuple | None = None,
    curvature: str = "global",
    method: str = "best",
    deployed: str | None = None,
    progress: bool = False,
) -> Certificate:
    r"""Certified l2 radii: how far each input can move before its label can change.

    Proved for the network in real arithmetic with its stored weights; every evaluation has its
    rounding error subtracted (:mod:`crcbook.proof.rounding`). The radius is the largest one found
    for each class, and the smallest of these over the classes.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs in any shape that the model takes, a tensor or a NumPy
            array; one item without a batch dimension is answered as a batch of 1.
        y: ``(batch,)`` integer labels or ``(batch, classes)`` one-hot rows; None for the model's
            predictions.
        targets: ``"all"`` other classes, or only the ``"runner-up"`` (the second largest logit),
            which is no guarantee against the others.
        box: the lowest and the highest valid value of an input, such as ``(0.0, 1.0)``: the
            adversary must stay inside. Numbers, or tensors that broadcast to an input's shape, or
            to that of ``x`` for a box an item. Inputs may lie outside by a few roundings of their
            own precision: the box then reaches as far as they do. None for no box.
        curvature: ``"global"``, over all of R^n, or ``"local"``: over balls around the inputs,
            for those that the global bound leaves short of the nearest adversarial point found.
            Local bounds are never smaller and take an eigenvalue problem an input and class each.
        method: ``"dual"``, the best quadratic found and, with local curvature, slabs and paths;
            ``"closed-form"``, the quadratic at the input (Entesari et al. 2024);
            ``"lipschitz"``, the margin over a global Lipschitz constant;
            ``"crown"``, linear relaxations (Zhang et al. 2018), slow; ``"parabolas"``, quadratic
            ones of the first layer (:mod:`crcbook.proof.parabolas`), slower; or ``"best"`` of all:
            the dual where it can win, Lipschitz and CROWN where the radius is below 0.8 of the
            distance of the nearest adversarial point found, parabolas where it is then below 0.9
            of it, if there is one hidden layer of moderate width, or several and local curvature.
        deployed: None for the network in real arithmetic; ``"float32"`` for the program that torch
            runs, whatever the order of its sums: no float32 input closer than the radius is
            classified differently by it (:mod:`crcbook.deployed`). For models that apply Linear
            layers and activations in turn; in float32 products that no setting shortens.
        progress: show a progress bar.

    Returns:
        The radii, in the units of the input, with the classes and points that limit them.

    Raises:
        TypeError: for a model or tensors of the wrong kind.
        ValueError: for a layer that cannot be certified, a wrong shape or range, NaN or infinity,
            an unknown option, or a box or local curvature with a method other than ``"dual"`` and
            ``"best"``.
    """
    asked = _Asked(targets, box, curvature, method, deployed)
    problem = _Problem.of(model, x, y, asked)
    parts = [problem.certify(chunk) for chunk in problem.chunks(progress, "certify")]
    columns, won = zip(*parts, strict=True)
    methods = tuple(name for names in won for name in names)
    radius, target, exact, point, distance, open_ = map(torch.cat, zip(*columns, strict=True))
    wide = hint(int(open_.sum()), len(open_), asked.left)
    nearest = problem.items.like(point)
    return Certificate(radius, target, exact, nearest, distance, methods, targets, wide)


def verify(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    radius: float | Tensor | None = None,
    targets: str = "all",
    box: tuple | None = None,
    curvature: str = "global",
    method: str = "best",
    deployed: str | None = None,
    progress: bool = False,
) -> Verdict:
    """Decide whether each label is certain in the l2 ball of a given radius.

    The search for a class stops as soon as its margin is proved positive, and no other class is
    searched where the runner-up's is not: ``margin`` is a valid lower bound but not the best one.
    What is not proved is attacked for a few steps.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs, as in :func:`certify`.
        y: ``(batch,)`` labels, as in :func:`certify`; None for the model's predictions.
        radius: the l2 radius of the ball, or ``(batch,)`` of them, in the units of the input. It
            must be given.
        targets: ``"all"`` or ``"runner-up"``, as in :func:`certify`.
        box: the valid inputs, as in :func:`certify`.
        curvature: ``"global"``, or ``"local"`` over the ball for margins the global bound leaves
            undecided.
        method: as in :func:`certify`; ``"best"`` tries the dual where it can decide, and the others
            where neither it nor the attack did.
        deployed: as in :func:`certify`.
        progress: show a progress bar.

    Returns:
        The verdicts.

    Raises:
        TypeError: for a model or tensors of the wrong kind.
        ValueError: for a layer that cannot be certified, a wrong shape or range, NaN or infinity,
            or an unknown option.
    """
    asked = _Asked(targets, box, curvature, method, deployed)
    problem = _Problem.of(model, x, y, asked)
    radii = as_radii(radius, problem.items)
    if (radii > farthest(problem.prover)).any():
        raise ValueError(f"a float32 program is verified up to {FARTHEST:g}; got {radii.max():g}")
    parts = [problem.verify(chunk, radii[chunk]) for chunk in problem.chunks(progress, "verify")]
    margin, target, point = (torch.cat(column) for column in zip(*parts, strict=True))
    robust, nearest = margin > 0, problem.items.like(point)
    undecided = int((~robust & point.isnan().any(1)).sum())
    wide = hint(undecided, len(robust), asked.left)
    return Verdict(robust, margin, target, nearest, radii, targets, wide)


def verify_by_kind(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    radius: float | Tensor,
    box: tuple | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Which labels each kind of certificate proves in the l2 ball of a given radius.

    The kinds go on from each other's bounds, in one table: asking for all of them takes little more
    than asking for the last.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` labels; None for the model's predictions.
        radius: the l2 radius of the ball, or ``(batch,)`` of them, in the units of the input.
        box: the valid inputs, as in :func:`certify`; None for none.
        progress: show a progress bar.

    Returns:
        ``(batch,)`` bool each, none of which is below the one before: ``"global"`` and ``"local"``
        curvature, and with a box ``"global in box"`` and ``"local in box"``.
    """
    problem = _Problem.of(model, x, y, _Asked("all", box, "local", "dual"))
    radii = as_radii(radius, problem.items)
    parts = [problem.kinds(chunk, radii[chunk]) for chunk in problem.chunks(progress, "kinds")]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class _Asked:
    """The options of a question, as they were given."""

    targets: str
    box: tuple | None
    curvature: str
    method: str
    deployed: str | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("targets", self.targets, ("all", "runner-up")),
            ("curvature", self.curvature, ("global", "local")),
            ("method", self.method, (*METHODS, "best")),
            ("deployed", self.deployed, (None, "float32")),
        ):
            if value not in choices:
                known, asked = list(map(str, choices)), str(value)
                asked = "crown" if asked == "lines" else asked.replace("_", "-")
                near = next(iter(get_close_matches(asked, known, 1)), "")
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; got {value!r}"
                    f"{f': did you mean {near!r}?' if near else ''}"
                )
        if self.method in METHODS[1:] and (self.box is not None or self.local):
            raise ValueError(f"method {self.method!r} knows neither a box nor local curvature")

    @property
    def local(self) -> bool:
        """Whether the curvature of balls was asked for."""
        return self.curvature == "local"

    @property
    def left(self) -> list[str]:
        """What was not asked for, and may prove more."""
        limited = "box=(lowest, highest), if inputs have limits,"
        words = 'method="best"', 'curvature="local"', limited
        return untried(self.method, self.curvature, self.box, words)


@dataclass(frozen=True)
class _Problem:
    """A checked batch, the network it belongs to, and what is asked for."""

    prover: Prover
    glance: Glance
    items: Items
    y: Tensor
    box: Box | None
    asked: _Asked

    @classmethod
    def of(cls, model: nn.Module, x: Any, y: Any, asked: _Asked) -> "_Problem":
        network, items = read_items(model, x)
        y = as_labels(y, network, items)
        box = as_box(asked.box, items.x, items.shape, items.dtype)
        prover = deployed_prover(model, network) if asked.deployed else Prover.of(network)
        return cls(prover, Glance.of(prover), items, y, box, asked)

    @cached_property
    def plan(self) -> Plan:
        """Which stages are asked."""
        asked = self.asked
        return Plan(self.prover, self.glance, asked.method, asked.local, self.box is not None)

    def chunks(self, progress: bool, description: str) -> Iterator[slice]:
        """Slices of a fixed size, so that memory is bounded."""
        network = self.prover.network
        widest = max(layer.weight.shape[1] for layer in network.layers)
        size = max(1, _CHUNK_VALUES // (widest * network.classes))
        starts = range(0, len(self.items), size)
        for start in tqdm(starts, desc=description, disable=not progress, unit="chunk"):
            yield slice(start, start + size)

    def table(self, chunk: slice, question: Question, alone: bool) -> Table:
        """The bounds of some inputs, or of their runners-up alone, after a glance."""
        images = Images.of(self.glance, self.items.x[chunk], self.y[chunk], alone)
        table = Table.of(self.prover, images, self.box and self.box.take(chunk))
        if self.asked.method in ("dual", "best"):
            table.glance(question, self.glance)
        return table

    def rounded(self, table: Table, point: Tensor, radius: Tensor | None = None) -> Tensor:
        """Adversarial points in the precision of the inputs."""
        images = table.images
        return Rounding(self.prover, images.x, images.y, self.items.dtype, table.box)(point, radius)

    def certify(self, chunk: slice) -> tuple[list[Tensor], list[str]]:
        """The columns of a certificate."""
        question, runner_up = Radius(), self.asked.targets == "runner-up"
        # All classes decide whether rivals are asked: a runner-up's radius is of their table.
        table = self.table(chunk, question, runner_up and not self.plan.rivals)
        # A box is looked at after everything else, so that it can only raise what holds without.
        limits = self.plan.without_box(question, replace(table, box=None))
        boxed, in_boxed_balls = self.plan.boxed
        run(question, table, boxed)
        run(question, table, in_boxed_balls, question.together)
        if runner_up and self.plan.rivals:
            limits = Limits.of(table := table.of_runner_up())
        elif self.box is not None:
            limits = Limits.of(table)
        elif self.plan.rivals or self.asked.local:
            limits = Limits.of(table, limits)
        row = torch.arange(len(table.bound), device=table.bound.device)
        target = table.images.order[row, limits.column]
        names = [METHODS[number] for number in table.method[row, limits.column].tolist()]
        names = names if self.asked.method == "best" else [self.asked.method] * len(names)
        point = self.rounded(table, limits.point)
        away = distance_bound(table.images.x, point)
        wide = limits.far(table, CLOSE)
        return [limits.radius, target, limits.exact(), point, away, wide], names

    def verify(self, chunk: slice, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of a verdict."""
        question = Margin(radius, self.asked.local)
        table = self.table(chunk, question, self.asked.targets == "runner-up")
        plan = self.plan
        (everywhere, in_balls), (boxed, in_boxed_balls) = plan.stages, plan.boxed
        # What works in balls goes on from the dual's bounds, even those that decide nothing.
        promising = None if self.asked.local else plan.promising(question, table)
        run(question, table, everywhere, only=promising)
        run(question, table, boxed)
        attacked = Attacked.of(table, radius)
        undecided = ~attacked.found
        if plan.rivals:
            far = undecided & attacked.far_from(table, CLOSE)
            run(question, table, plan.rivals, question.together, far[:, None])
        run(question, table, plan.dear, question.together, undecided[:, None])
        in_balls = in_balls + in_boxed_balls
        run(question, table, in_balls, question.together, undecided[:, None])
        margin, column = proved_margins(table)
        point = self.rounded(table, attacked.point, radius)
        return margin, table.images.order.gather(1, column[:, None]).squeeze(1), point

    def kinds(self, chunk: slice, radius: Tensor) -> dict[str, Tensor]:
        """What each kind of certificate proves."""
        question = Margin(radius, patient=True)
        table, found = self.table(chunk, question, False), {}
        plan = self.plan
        in_turn = [("", plan.stages)] + ([(" in box", plan.boxed)] if self.box is not None else [])
        for where, (everywhere, in_balls) in in_turn:
            for name, stages, together in (
                ("global", everywhere, False), ("local", in_balls, question.together),
            ):  # fmt: skip
                run(question, table, stages, together)
                found[name + where] = proved_margins(table)[0] > 0
        return found
