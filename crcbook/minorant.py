r"""Quadratics that lie below a margin, and the search for the best of them.

Let f be the margin of a label over a target and :math:`k \ge 0` with
:math:`\nabla^2 f \succeq -kI`. At any point c, a second-order Taylor expansion bounds f from below
everywhere, and expanded again at the input :math:`x_0` it reads

.. math:: f(x_0 + \delta) \ge q - s \cdot \delta - \tfrac k2 \|\delta\|^2, \qquad
   q = f(c) + \nabla f(c) \cdot (x_0 - c) - \tfrac k2 \|x_0 - c\|^2, \quad
   s = -\nabla f(c) + k (x_0 - c).

So in the ball of radius :math:`\rho` the margin is at least :math:`q - \rho\|s\| - k\rho^2/2`, and
positive while :math:`\rho` is below :math:`2q/(\|s\| + \sqrt{\|s\|^2 + 2kq})`. Any c is proof
enough; c = x_0 gives the closed form of Entesari et al. (2024), and the best c gives the convex
dual of Singla & Feizi (2020), Theorem 1 (radius) and Theorem 2 (fixed radius). A search chooses c;
nothing rests on whether it converged, nor on the precision it ran in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.arithmetic import OUTWARD, UNIT, gamma
from crcbook.networks import Network
from crcbook.rounding import RoundingModel

_GAIN = 1e-7  # a smaller relative gain counts as none
_PATIENCE = 6  # steps without a gain
_SETTLED = 1e-5  # of the distance; what is left to gain is of the order of its square
_SHORTEST = 0.01  # of a full step


@dataclass(frozen=True)
class Pairs:
    """Margins to bound, one input and one pair of classes each.

    Attributes:
        x0: ``(pairs, n)`` inputs.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
        curvature: ``(pairs,)`` proved bounds k.
    """

    x0: Tensor
    label: Tensor
    target: Tensor
    curvature: Tensor

    def take(self, index: Tensor) -> "Pairs":
        """The pairs at ``index``.

        Args:
            index: positions or a mask.

        Returns:
            The chosen pairs.
        """
        return Pairs(self.x0[index], self.label[index], self.target[index], self.curvature[index])

    def to(self, dtype: torch.dtype) -> "Pairs":
        """The same pairs, rounded, for a search.

        Args:
            dtype: a floating-point dtype.

        Returns:
            The pairs.
        """
        return Pairs(self.x0.to(dtype), self.label, self.target, self.curvature.to(dtype))


@dataclass(frozen=True)
class Minorant:
    r"""The bound :math:`q - s\cdot\delta - k\|\delta\|^2/2` of each pair.

    Attributes:
        value: ``(pairs,)`` q, rounded down.
        slope: ``(pairs,)`` the norm of s, rounded up.
        direction: ``(pairs, n)`` s itself: where the bound falls fastest.
        curvature: ``(pairs,)`` k.
    """

    value: Tensor
    slope: Tensor
    direction: Tensor
    curvature: Tensor

    def radius(self) -> Tensor:
        """How far the bound stays positive.

        Returns:
            ``(pairs,)`` l2 radii, rounded down; 0 where the bound is not positive at the input.
        """
        root = (self.slope**2 + 2 * self.curvature * self.value.clamp(min=0)).sqrt()
        radius = 2 * self.value / (self.slope + root) / OUTWARD
        return torch.where(self.value > 0, radius, 0.0).nan_to_num(nan=0.0, posinf=torch.inf)

    def margin(self, radius: float) -> Tensor:
        """The smallest value of the bound in a ball.

        Args:
            radius: the ball's l2 radius.

        Returns:
            ``(pairs,)``, rounded down; minus infinity where something overflowed.
        """
        fall = radius * self.slope + self.curvature * radius**2 / 2
        margin = self.value - fall - (self.value.abs() + fall) * 8 * UNIT
        return torch.where(margin.isnan(), -torch.inf, margin)


@dataclass(frozen=True)
class Prover:
    """Float64 evaluations of a network, rounded to the safe side.

    Attributes:
        network: the float64 network.
        rounding: its error bounds.
    """

    network: Network
    rounding: RoundingModel

    @classmethod
    def of(cls, network: Network) -> "Prover":
        """Prepare the error bounds of a network.

        Args:
            network: the float64 network.

        Returns:
            The prover.
        """
        return cls(network, RoundingModel.of(network))

    def floor(self, label: Tensor, target: Tensor) -> Tensor:
        """Lower bounds of margins over all of R^n, from the range of the last activation.

        Args:
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.

        Returns:
            ``(pairs,)``; minus infinity where there is none.
        """
        weights, offset = self._last(label, target)
        if len(self.network.layers) == 1:
            return torch.where((weights == 0).all(1), offset, -torch.inf)
        low, high = self.network.layers[-2].activation.value_range
        lowest = torch.where(weights > 0, weights * low, weights * high)
        lowest = torch.where(weights == 0, 0.0, lowest)
        size = lowest.abs().sum(1) + 2 * offset.abs()
        floor = lowest.sum(1) + offset - gamma(weights.shape[1] + 8) * size
        return (floor - self.rounding.deviation(weights)).nan_to_num(nan=-torch.inf)

    def minorant(self, pairs: Pairs, point: Tensor, margin: Tensor, gradient: Tensor) -> Minorant:
        r"""The minorants of an evaluation.

        The inner product, the squares and the three sums err by at most gamma of their lengths;
        the errors of f and of its gradient enter as :math:`e_f + e_g\|x_0 - c\|` and
        :math:`e_g`.

        Args:
            pairs: the margins.
            point: ``(pairs, n)`` the points c.
            margin: ``(pairs,)`` computed values there.
            gradient: ``(pairs, n)`` computed gradients there.

        Returns:
            The minorants.
        """
        k, away = pairs.curvature, pairs.x0 - point
        value_error, slope_error, deviation = self._errors(pairs, point)
        distance, steepness = away.norm(dim=1), gradient.norm(dim=1)
        value = margin + (gradient * away).sum(1) - k / 2 * distance**2
        terms = gamma(away.shape[1] + 8)
        size = margin.abs() + steepness * distance + k * distance**2
        value = value - (value_error + slope_error * distance + terms * size + deviation) * OUTWARD
        direction = k[:, None] * away - gradient
        slope = direction.norm(dim=1)
        slope = slope + slope_error + terms * (slope + steepness + k * distance)
        return Minorant(value, slope * OUTWARD, direction, k)

    def is_adversarial(self, pairs: Pairs, point: Tensor) -> Tensor:
        """Whether a margin is proved not to be positive at a point.

        Args:
            pairs: the margins.
            point: ``(pairs, n)``.

        Returns:
            ``(pairs,)`` bool.
        """
        margin, _ = self.network.margin_and_gradient(point, pairs.label, pairs.target)
        value_error, _, deviation = self._errors(pairs, point)
        return margin + value_error + deviation <= 0

    def _last(self, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.network.layers[-1].bias
        return self.network.margin_weights(label, target), bias[label] - bias[target]

    def _errors(self, pairs: Pairs, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, offset = self._last(pairs.label, pairs.target)
        value, slope = self.rounding.errors(point.norm(dim=1), weights, offset)
        return value, slope, self.rounding.deviation(weights)


def search(
    network: Network,
    pairs: Pairs,
    start: Tensor,
    steps: int,
    limit: Tensor,
    radius: float | None = None,
) -> Tensor:
    r"""Look for the points c of the best minorants, by fixed-point steps.

    A step moves c towards :math:`x_0 - \eta \nabla f(c)`. :math:`\eta` is the dual variable: for a
    radius it makes the linearised margin vanish, for a ball it puts the point on the sphere; never
    more than 1/k, where the dual ends. The length of the step is Barzilai and Borwein's: full
    steps would cycle where a margin is strongly curved.

    Args:
        network: the network, in the precision of the search.
        pairs: the margins.
        start: ``(pairs, n)`` float64 points to start from.
        steps: at most so many gradients a pair.
        limit: ``(pairs,)`` bounds that are good enough.
        radius: of the ball to bound the margin in; None to enlarge the certified radius.

    Returns:
        ``(pairs, n)`` float64 points, finite.
    """
    dtype = network.layers[0].weight.dtype
    walk = _Walk.start(pairs.to(dtype), start.to(dtype))
    best = torch.full_like(walk.pairs.curvature, -torch.inf)
    points = walk.point.clone()
    enough = limit + 4 * torch.finfo(dtype).eps * (1 + limit.abs())
    active = torch.arange(len(best), device=best.device)
    for _ in range(steps if len(active) else 0):
        margin, gradient = network.margin_and_gradient(
            walk.point, walk.pairs.label, walk.pairs.target
        )
        bound = walk.bound(margin, gradient, radius)
        gain = bound - best[active]
        better = gain > 0
        best[active[better]], points[active[better]] = bound[better], walk.point[better]
        keep = walk.advance(margin, gradient, gain > _GAIN * bound.abs(), radius)
        keep &= ~(best[active] > enough[active])
        if radius is not None:
            keep &= ~(margin < 0)  # an adversary in the ball: there is nothing to prove
        active, walk = active[keep], walk.take(keep)
        if not len(active):
            break
    points = points.double()
    return torch.where(points.isfinite(), points, start)


@dataclass
class _Walk:
    """Where each search is, and what the last step taught it."""

    pairs: Pairs
    point: Tensor
    step: Tensor  # the last change of the point
    move: Tensor  # the last residual
    stalled: Tensor

    @classmethod
    def start(cls, pairs: Pairs, point: Tensor) -> "_Walk":
        zeros = torch.zeros_like(point)
        return cls(pairs, point, zeros, zeros, torch.zeros_like(pairs.label))

    def bound(self, margin: Tensor, gradient: Tensor, radius: float | None) -> Tensor:
        """The minorants' radius or margin, without the rounding that a proof subtracts."""
        k, away = self.pairs.curvature, self.pairs.x0 - self.point
        direction = k[:, None] * away - gradient
        value = margin + (gradient * away).sum(1) - k / 2 * away.square().sum(1)
        minorant = Minorant(value, direction.norm(dim=1), direction, k)
        return minorant.radius() if radius is None else minorant.margin(radius)

    def advance(self, margin, gradient, improved, radius: float | None) -> Tensor:
        """Move the points; returns which searches are still worth a step."""
        away = self.pairs.x0 - self.point
        steepness = gradient.norm(dim=1)
        if radius is None:
            eta = (margin + (gradient * away).sum(1)) / steepness**2
        else:
            eta = radius / steepness
        eta = eta.clamp(min=0).minimum(1 / self.pairs.curvature)
        move = away - eta[:, None] * gradient
        change = self.move - move
        alpha = (self.step * change).sum(1) / change.square().sum(1)
        alpha = torch.where(alpha > 0, alpha, 1.0).clamp(_SHORTEST, 1.0)
        self.step, self.move = alpha[:, None] * move, move
        self.point = self.point + self.step
        self.stalled = torch.where(improved, 0, self.stalled + 1)
        settled = move.norm(dim=1) <= _SETTLED * away.norm(dim=1)
        return (self.stalled < _PATIENCE) & ~settled & move.isfinite().all(1)

    def take(self, keep: Tensor) -> "_Walk":
        """The searches that go on."""
        return _Walk(
            self.pairs.take(keep),
            self.point[keep],
            self.step[keep],
            self.move[keep],
            self.stalled[keep],
        )
