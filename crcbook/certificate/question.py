"""The two questions one can ask of a margin: how far it stays positive, and how small it can get.

Nothing else knows which of the two is asked. A question says what a quadratic proves, what a proof
in a whole ball is worth, and where a search should look next.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from crcbook.checks import LARGEST, SMALLEST_RADIUS
from crcbook.proof.arithmetic import OUTWARD
from crcbook.proof.prover import Entries
from crcbook.proof.quadratic import Parabola, Quadratic
from crcbook.steps import step_to_boundary, step_to_sphere

if TYPE_CHECKING:  # it asks questions itself
    from crcbook.stages.local import Local

_TRIALS = 5  # balls an image: each halves what is left between proof and attack
_GAP = 1e-3  # of the distance; closer than that, local curvature is not worth its price
_ON_THE_EDGE = 1 + 1e-5  # of a ball's radius: a float32 point there may lie beyond by its roundings


class Question(Protocol):
    """What a lower bound is about."""

    @property
    def polishes(self) -> bool:
        """Whether the last digits of a bound count."""

    @property
    def thorough(self) -> bool:
        """Whether a dear proof in a ball is worth its price where a cheaper one failed."""

    @property
    def together(self) -> bool:
        """Whether all classes are looked at in balls at once, in place of the runner-up first."""

    def proves(self, entries: Entries, quadratic: Quadratic | Parabola) -> Tensor:
        """The bounds that quadratics prove.

        Args:
            entries: the margins.
            quadratic: below them, where their curvatures are valid.

        Returns:
            ``(entries,)``.
        """

    def worth(self, entries: Entries, margin: Tensor) -> Tensor:
        """The bounds that margins over the whole of the valid balls prove.

        Args:
            entries: the margins.
            margin: ``(entries,)`` lower bounds of them in the balls.

        Returns:
            ``(entries,)``.
        """

    def short(self, entries: Entries, bound: Tensor) -> Tensor:
        """Which bounds the valid balls can still raise.

        Args:
            entries: the margins.
            bound: ``(entries,)`` what is proved of them.

        Returns:
            ``(entries,)`` bool.
        """

    def step(self, entries: Entries, margin: Tensor, gradient: Tensor) -> Tensor:
        r"""How far along the gradient the best point is, if the gradient were constant.

        Args:
            entries: the margins.
            margin: ``(entries,)`` linearised at the inputs.
            gradient: ``(entries, n)``.

        Returns:
            ``(entries,)`` the :math:`\eta` of the point :math:`x_0 - \eta \nabla f`.
        """

    def reach(self, entries: Entries) -> Tensor:
        """How far from the inputs the first point of a search should be.

        Args:
            entries: the margins.

        Returns:
            ``(entries,)`` l2 distances.
        """

    def refuted(self, entries: Entries, d: Tensor, margin: Tensor) -> Tensor:
        """Where the margin at a point of a search answers the question with no.

        Args:
            entries: the margins.
            d: ``(entries, n)`` displacements of the points.
            margin: ``(entries,)`` at the points.

        Returns:
            ``(entries,)`` bool.
        """

    def goal(self, bound: Tensor, first: bool) -> Tensor:
        """Bounds that need not be raised any further.

        Args:
            bound: ``(images, columns)`` those of the table, the runner-up's in the first column.
            first: whether they are for the runner-up, which comes before the others.

        Returns:
            ``(images,)``.
        """

    def asks(self, bound: Tensor) -> Tensor:
        """Whose other classes matter, once the runner-up's bound is known.

        Args:
            bound: ``(images, columns)`` those of the table.

        Returns:
            ``(images,)`` bool.
        """

    def ask(self, entries: Entries, margin: Callable, radius: Callable) -> Tensor:
        """Ask a method that answers both questions in its own way.

        Args:
            entries: the margins.
            margin: of ``(entries,)`` radii, lower bounds of the margins in these balls.
            radius: of ``(entries,)`` goals, radii that are not raised beyond them.

        Returns:
            ``(entries,)`` bounds.
        """

    def everywhere(self, lowest: Tensor) -> Tensor:
        """The bounds that hold because of a bound over all of R^n.

        Args:
            lowest: ``(entries,)`` lower bounds of the margins over R^n.

        Returns:
            ``(entries,)``.
        """

    def promises(self, value: Tensor, curvature: Tensor, bound: Tensor, least: float) -> Tensor:
        r"""Where the best quadratic may prove more, for it is at most :math:`f - k\|\delta\|^2/2`.

        Args:
            value: ``(images, columns)`` the margins f at the inputs.
            curvature: ``(images, columns)`` k.
            bound: ``(images, columns)`` what is proved.
            least: a gain, as a share of a radius, that is worth a search.

        Returns:
            ``(images, columns)`` bool; without a box.
        """

    def in_balls(self, entries: Entries, bound: Tensor, local: "Local") -> None:
        """Raise bounds, in place, by what is proved in balls of radii that are worth trying.

        Args:
            entries: the margins.
            bound: ``(entries,)`` what is proved of them.
            local: the :class:`crcbook.stages.local.Local` that proves.
        """


@dataclass(frozen=True)
class Radius:
    """How far can an input move before a target overtakes its label?"""

    polishes: bool = True  # the last digits of a radius count
    thorough: bool = False  # a search would meet a dear proof in vain at every ball too large
    together: bool = False  # in balls no other class can lower the runner-up's radius

    def proves(self, entries: Entries, quadratic: Quadratic | Parabola) -> Tensor:
        """The quadratic's radius, or the ball's where it is the smaller one."""
        return quadratic.radius().minimum(entries.valid)

    def worth(self, entries: Entries, margin: Tensor) -> Tensor:
        """The ball's radius where the margin is positive."""
        return torch.where(margin > 0, entries.valid, 0.0)

    def short(self, entries: Entries, bound: Tensor) -> Tensor:
        """Radii below the ball's."""
        return bound < entries.valid

    def step(self, entries: Entries, margin: Tensor, gradient: Tensor) -> Tensor:
        """To where the linearised margin vanishes."""
        return step_to_boundary(margin, gradient, entries.allowed)

    def reach(self, entries: Entries) -> Tensor:
        """As far as the goal; without one, as the bound that is known."""
        return torch.where(entries.goal.isfinite(), entries.goal, entries.bound)

    def refuted(self, entries: Entries, d: Tensor, margin: Tensor) -> Tensor:
        """Never: every input has a radius."""
        return torch.zeros_like(margin, dtype=torch.bool)

    def goal(self, bound: Tensor, first: bool) -> Tensor:
        """The runner-up's radius: beyond it no other class is in the way."""
        return torch.full_like(bound[:, 0], torch.inf) if first else bound[:, 0]

    def asks(self, bound: Tensor) -> Tensor:
        """Those of inputs whose runner-up leaves a radius."""
        return bound[:, 0] > 0

    def ask(self, entries: Entries, margin: Callable, radius: Callable) -> Tensor:
        """The radii."""
        return radius(entries.goal)

    def everywhere(self, lowest: Tensor) -> Tensor:
        """What a bound of the margin over all of R^n proves."""
        return torch.where(lowest > 0, torch.inf, -torch.inf)

    def promises(self, value: Tensor, curvature: Tensor, bound: Tensor, least: float) -> Tensor:
        """Where the largest radius that a quadratic can have is larger than the bound."""
        return (2 * value / curvature).sqrt() > (1 + least) * bound

    def in_balls(self, entries: Entries, bound: Tensor, local: "Local") -> None:
        """Balls between what is proved and what is attacked, until one fills its own.

        A radius proved with the curvature of a ball is at most the ball's. Bisection looks for the
        ball that its own curvature fills; where no adversary is known, the balls grow first. All
        classes of an image share their balls, for the smallest radius is the one that counts.
        """
        images, place = entries.image.unique(return_inverse=True)

        def smallest(values: Tensor) -> Tensor:
            found = values.new_full((len(images),), torch.inf)
            return found.scatter_reduce(0, place, values, "amin")

        distance = local.distances(entries)
        upper = smallest(distance.nan_to_num(nan=torch.inf).minimum(entries.goal * OUTWARD))
        unknown = upper.isinf()
        upper = torch.where(unknown, 2 * smallest(bound), upper)
        trial = upper.clamp(SMALLEST_RADIUS, LARGEST)
        for _ in range(_TRIALS):
            low = smallest(bound)
            wide = ((upper - low) > _GAP * upper)[place] & (bound < trial[place])
            if not wide.any():
                break
            rows = wide.nonzero().squeeze(1)
            few = replace(entries, bound=bound).take(rows)
            bound[rows] = local.raise_bounds(self, few, trial[place[rows]])
            low = smallest(bound)
            filled = low >= trial
            upper = torch.where(filled, upper, torch.minimum(upper, trial))
            unknown &= filled
            upper = torch.where(unknown, 2 * upper, upper)
            middle = (low + upper) / 2
            trial = torch.where(unknown, upper, middle).clamp(SMALLEST_RADIUS, LARGEST)


@dataclass(frozen=True)
class Margin:
    """How small can the margin get in the l2 ball of a given radius?

    Attributes:
        radius: ``(images,)`` float64, a number an image.
        patient: whether a later stage may still decide what is not decided at first.
    """

    radius: Tensor
    patient: bool = False
    polishes: bool = False  # its sign is what counts
    thorough: bool = True
    together: bool = True  # in balls the worst class of an image comes first

    def proves(self, entries: Entries, quadratic: Quadratic | Parabola) -> Tensor:
        """The quadratic's smallest value in the ball."""
        radius = self.radius[entries.image]
        return torch.where(radius > entries.valid, -torch.inf, quadratic.margin(radius))

    def worth(self, entries: Entries, margin: Tensor) -> Tensor:
        """The margin itself, if the valid ball holds this one."""
        return torch.where(self.radius[entries.image] > entries.valid, -torch.inf, margin)

    def short(self, entries: Entries, bound: Tensor) -> Tensor:
        """Margins that are not positive."""
        return bound <= 0

    def step(self, entries: Entries, margin: Tensor, gradient: Tensor) -> Tensor:
        """To the sphere."""
        radius = self.radius[entries.image].to(gradient.dtype)
        return step_to_sphere(gradient, radius, entries.allowed)

    def reach(self, entries: Entries) -> Tensor:
        """The ball's radius."""
        return self.radius[entries.image]

    def refuted(self, entries: Entries, d: Tensor, margin: Tensor) -> Tensor:
        """Where it is negative: an adversary in the ball, on whose edge a search's points are."""
        return (margin < 0) & (d.norm(dim=1) <= _ON_THE_EDGE * self.radius[entries.image])

    def goal(self, bound: Tensor, first: bool) -> Tensor:
        """Zero: a positive margin is proof."""
        return torch.zeros_like(bound[:, 0])

    def asks(self, bound: Tensor) -> Tensor:
        """Those of images that the runner-up leaves a verdict, or may leave one later."""
        return (bound[:, 0] > 0) | self.patient

    def ask(self, entries: Entries, margin: Callable, radius: Callable) -> Tensor:
        """The margins in the balls."""
        return margin(self.radius[entries.image])

    def everywhere(self, lowest: Tensor) -> Tensor:
        """That bound itself."""
        return lowest

    def in_balls(self, entries: Entries, bound: Tensor, local: "Local") -> None:
        """The ball that is asked about, unless an adversary in it is found at once."""
        radius = self.radius[entries.image]
        lost = entries.image[local.adversaries(entries, radius)]
        rows = torch.isin(entries.image, lost, invert=True).nonzero().squeeze(1)
        if len(rows):
            bound[rows] = local.raise_bounds(self, entries.take(rows), radius[rows])

    def promises(self, value: Tensor, curvature: Tensor, bound: Tensor, least: float) -> Tensor:
        """Where the curvature alone leaves something of the margin in the ball."""
        return value > curvature * self.radius[:, None].square() / 2
