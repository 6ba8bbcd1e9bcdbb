r"""Quadratics that lie below a margin, and what they prove.

Let f be the margin of a label over a target and :math:`k \ge 0` with
:math:`\nabla^2 f \succeq -kI`. At any point c, a second-order Taylor expansion bounds f from below
everywhere, and expanded again at the input :math:`x_0` it reads

.. math:: f(x_0 + \delta) \ge q - s \cdot \delta - \tfrac k2 \|\delta\|^2, \qquad
   q = f(c) + \nabla f(c) \cdot (x_0 - c) - \tfrac k2 \|x_0 - c\|^2, \quad
   s = -\nabla f(c) + k (x_0 - c).

So in the ball of radius :math:`\rho` the margin is at least :math:`q - \rho\|s\| - k\rho^2/2`, and
positive while :math:`\rho` is below :math:`2q/(\|s\| + \sqrt{\|s\|^2 + 2kq})`. Any c is proof
enough; c = x_0 gives the closed form of Entesari et al. (2024), and the best c gives the convex
dual of Singla & Feizi (2020), Theorem 1 (radius) and Theorem 2 (fixed radius). A search chooses c
(:mod:`crcbook.stages.search`); nothing rests on whether it converged, nor on its precision.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from crcbook.networks import Network, remembered
from crcbook.proof.arithmetic import OUTWARD, TINY, TINY_NORM, UNIT, gamma, single_sums_hold
from crcbook.proof.box import Box, Room
from crcbook.proof.curvature import downward_curvature
from crcbook.proof.eigenvalues import NormSketch, Remainder
from crcbook.proof.rounding import RoundingModel

_FEW_CLASSES = 16  # whose pairs' remainders are prepared
_ALIKE = 64  # left singular vectors
_LEAST_SHRINK = 0.3  # near the end of the sketch, where its coordinates mean little
# The bound is flat at the best multiplier: half the digits of the precision are enough.
_BISECTIONS = {torch.float32: 12, torch.float64: 28}


@dataclass(frozen=True)
class Pairs:
    """Margins to bound, one input and one pair of classes each.

    Attributes:
        x0: ``(pairs, n)`` inputs.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
        curvature: ``(pairs,)`` proved bounds k.
        room: where the adversary may go; None for everywhere.
        shift: ``(pairs, width)`` what the first layer adds where points have other coordinates, as
            in :mod:`crcbook.stages.single`; None for nothing.
    """

    x0: Tensor
    label: Tensor
    target: Tensor
    curvature: Tensor
    room: Room | None = None
    shift: Tensor | None = None

    @classmethod
    def of(
        cls, network: Network, x0: Tensor, label: Tensor, target: Tensor, box: Box | None = None
    ) -> "Pairs":
        """Margins of a network, with its curvature over all of R^n.

        Args:
            network: the float64 network.
            x0: ``(pairs, n)`` inputs.
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.
            box: where the adversary must stay; None for everywhere.

        Returns:
            The pairs.
        """
        room = None if box is None else box.room(x0)
        return cls(x0, label, target, downward_curvature(network, label, target), room)

    def take(self, index: Tensor) -> "Pairs":
        """The pairs at ``index``.

        Args:
            index: positions or a mask.

        Returns:
            The chosen pairs.
        """
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        columns = (self.x0, self.label, self.target, self.curvature)
        room = None if self.room is None else self.room.take(index)
        shift = None if self.shift is None else self.shift.index_select(0, index)
        return Pairs(*(column.index_select(0, index) for column in columns), room, shift)

    def to(self, dtype: torch.dtype) -> "Pairs":
        """The same pairs, rounded, for a search.

        Args:
            dtype: a floating-point dtype.

        Returns:
            The pairs.
        """
        room = None if self.room is None else self.room.to(dtype)
        shift = None if self.shift is None else self.shift.to(dtype)
        numbers = self.x0.to(dtype), self.label, self.target, self.curvature.to(dtype)
        return Pairs(*numbers, room, shift)


def parabola_radius(value: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    r"""How far :math:`q - s r - kr^2/2` stays positive.

    Args:
        value: ``(pairs,)`` q.
        slope: ``(pairs,)`` s, at least 0.
        curvature: ``(pairs,)`` k, at least 0.

    Returns:
        ``(pairs,)`` radii, rounded down; 0 where q is not positive.
    """
    root = (slope**2 + 2 * curvature * value.clamp(min=0)).sqrt()
    radius = (value / (slope + root) * 2 / OUTWARD).nan_to_num(nan=0.0)  # never infinite
    return torch.where(value > 0, radius, 0.0)


def parabola_margin(value: Tensor, slope: Tensor, curvature: Tensor, radius: float) -> Tensor:
    r"""The smallest value of :math:`q - s r - kr^2/2` up to a radius.

    Args:
        value: ``(pairs,)`` q.
        slope: ``(pairs,)`` s, at least 0.
        curvature: ``(pairs,)`` k, at least 0.
        radius: the largest r.

    Returns:
        ``(pairs,)``, rounded down; minus infinity where something overflowed.
    """
    fall = radius * slope + curvature * (radius * radius) / 2
    margin = value - fall - (value.abs() + fall) * 8 * UNIT
    return torch.where(margin.isnan(), -torch.inf, margin)


@dataclass(frozen=True)
class Minorant:
    r"""The bound :math:`q - s\cdot\delta - k\|\delta\|^2/2` of each pair.

    In a box the smallest value is bounded by Lagrange duality. For any :math:`\lambda \ge k` and
    every displacement of length at most :math:`\rho`, the bound is at least
    :math:`h(\lambda) - \lambda\rho^2/2` with

    .. math:: h(\lambda) = \min_{\delta \in \text{box}} q - s\cdot\delta +
       \tfrac{\lambda-k}2\|\delta\|^2, \quad\text{attained at}\quad
       \delta = \mathrm{clip}(s/(\lambda-k)),

    which is positive while :math:`\rho^2 < 2h(\lambda)/\lambda`.

    Attributes:
        value: ``(pairs,)`` q, rounded down.
        direction: ``(pairs, n)`` s: where the bound falls fastest.
        error: ``(pairs,)`` a bound of the rounding error of s, an l2 norm.
        curvature: ``(pairs,)`` k.
        room: where the adversary may go; None for everywhere.
    """

    value: Tensor
    direction: Tensor
    error: Tensor
    curvature: Tensor
    room: Room | None = None

    @property
    def slope(self) -> Tensor:
        """``(pairs,)`` the norm of s, rounded upward."""
        terms = 1 + gamma(self.direction.shape[1] + 4)
        return self.direction.norm(dim=1) * terms + self.error + TINY_NORM

    def radius(self) -> Tensor:
        """How far the bound stays positive.

        Returns:
            ``(pairs,)`` l2 radii, rounded down; 0 where the bound is not positive at the input,
            infinity where it is positive in the whole box.
        """
        radius = parabola_radius(self.value, self.slope, self.curvature)
        if self.room is not None:
            radius = radius.fmax(self._radius_in_box(radius) / OUTWARD)
        return torch.where(self.value > 0, radius, 0.0)

    def margin(self, radius: float) -> Tensor:
        """The smallest value of the bound in a ball.

        Args:
            radius: the ball's l2 radius.

        Returns:
            ``(pairs,)``, rounded down; minus infinity where something overflowed.
        """
        margin = parabola_margin(self.value, self.slope, self.curvature, radius)
        if self.room is not None:
            square = radius * radius
            multiplier = self._multiplier(
                torch.full_like(margin, min(radius, torch.finfo(margin.dtype).max)), fixed=True
            )
            fall = multiplier * square / 2 + self.error * radius
            inner = self._smallest(multiplier)
            margin = margin.fmax(inner - fall - (inner.abs() + fall) * 8 * UNIT)
        return torch.where(margin.isnan(), -torch.inf, margin)

    def nearest(self, radius: Tensor) -> Tensor:
        """Where the bound reaches zero first: the place to look for an adversary.

        Args:
            radius: ``(pairs,)`` what :meth:`radius` returned.

        Returns:
            ``(pairs, n)`` displacements.
        """
        if self.room is None:
            finite = torch.where(radius.isfinite(), radius, 0.0)
            return finite[:, None] * normalize(self.direction, dim=1, eps=TINY)
        return self._displacement(self._multiplier(radius, fixed=False))

    def _radius_in_box(self, plain: Tensor) -> Tensor:
        multiplier = self._multiplier(plain, fixed=False)
        reach = self.room.reach()
        inner = self._smallest(multiplier)
        first = (inner.clamp(min=0) / multiplier * 2).sqrt().fmin(reach)
        # s is known within its error, which tilts the bound by at most that much a unit length.
        inner = (inner - self.error * first * OUTWARD).clamp(min=0)
        radius = torch.where(inner > 0, (inner / multiplier * 2).sqrt(), 0.0)
        return torch.where(radius > reach * OUTWARD, torch.inf, radius)

    def _smallest(self, multiplier: Tensor) -> Tensor:
        """h, rounded down."""
        delta = self._displacement(multiplier)
        linear = (self.direction * delta).sum(1)
        square = (multiplier - self.curvature) / 2 * delta.square().sum(1)
        # The minimiser is rounded too: h is its value there less what a shift of it can gain.
        size = self.value.abs() + self.direction.norm(dim=1) * delta.norm(dim=1) + square
        return self.value - linear + square - gamma(4 * delta.shape[1] + 32) * size - TINY

    def _displacement(self, multiplier: Tensor) -> Tensor:
        rise = (multiplier - self.curvature).clamp(min=torch.finfo(multiplier.dtype).tiny)
        return self.room.clip(self.direction / rise[:, None])

    def _multiplier(self, radius: Tensor, fixed: bool) -> Tensor:
        r"""A good :math:`\lambda`, by bisection; every :math:`\lambda \ge k` is a valid one.

        In a ball of a ``fixed`` radius the displacement has that length; otherwise
        :math:`2h(\lambda)/\lambda` is largest where it is the displacement's squared length. With
        no box it is :math:`k + \|s\|/\rho`, and a box only lowers it.
        """
        low, high = self.curvature, self.curvature + self.direction.norm(dim=1) / radius
        for _ in range(_BISECTIONS[radius.dtype]):
            middle = (low + high) / 2
            delta = self._displacement(middle)
            square = delta.square().sum(1)
            if fixed:
                beyond = square < radius * radius
            else:
                bound = self.value - (self.direction * delta).sum(1)
                beyond = bound + (middle - self.curvature) / 2 * square > middle / 2 * square
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return torch.where(high.isfinite(), high, self.curvature)


@dataclass(frozen=True)
class Prover:
    """Float64 evaluations of a network, rounded to the safe side.

    Attributes:
        network: the float64 network.
        rough: the same for searches, in float32 if that holds its sizes.
        rounding: the error bounds of the first.
        sketch: of the first layer's weight; None where it would save nothing.
        remainder: what the sketch leaves out of the gradients of margins, a row a pair of classes,
            in the precision ``quick``; None unless there is one hidden layer and few classes.
        quick: the precision of products whose digits hardly count: float32 where it is to be
            trusted.
    """

    network: Network
    rough: Network
    rounding: RoundingModel
    sketch: NormSketch | None
    remainder: Remainder | None
    quick: torch.dtype

    @classmethod
    def of(cls, network: Network) -> "Prover":
        """Prepare the error bounds of a network.

        Args:
            network: the float64 network.

        Returns:
            The prover.
        """
        quick = torch.float32 if single_sums_hold(network.device) else torch.float64
        remainder = _remainder(network)
        remainder = None if remainder is None else remainder.to(quick)
        rounding = RoundingModel.of(network)
        return cls(network, network.rough, rounding, _sketch(network), remainder, quick)

    def glance(
        self, x: Tensor, label: Tensor, target: Tensor, logits: Tensor, slopes: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""The values and bounds of the slopes of the minorants at c = x_0, for little.

        Classes of one input share its hidden layers, and the norm of a gradient is bounded by the
        sketch of the first layer instead of being computed.

        Args:
            x: ``(batch, n)`` the inputs.
            label: ``(batch,)`` classes.
            target: ``(batch, count)`` classes.
            logits: ``(batch, classes)``, as computed.
            slopes: of every hidden layer, from :meth:`Network.logits_and_slopes`.

        Returns:
            ``(batch, count)`` values q, rounded down, and slopes, rounded upward, and
            ``(batch, count, rank)`` gradients along the sketch's basis, in float32; rank 0 where
            there is none.
        """
        own, other = logits.gather(1, label[:, None]), logits.gather(1, target)
        # Each logit and each row errs by its own; the sums bound what a difference of two can.
        last = self.network.layers[-1]
        norms, sizes = last.weight.norm(dim=1), last.bias.abs()
        jumps = self.rounding.deviation(last.weight)
        norm, size, deviation = (
            column[label, None] + column[target] for column in (norms, sizes, jumps)
        )
        value_error, slope_error = self.rounding.errors(x.norm(dim=1, keepdim=True), norm, size)
        lost = value_error + 8 * UNIT * (own.abs() + other.abs()) + deviation
        if self.sketch is not None:
            rest = torch.inf
            if self.remainder is not None:
                rest = self.remainder.norms(slopes[0].to(self.quick))
                rest = rest.gather(1, _place(label[:, None], target, self.network.classes))
            units = self.network.units(slopes, label, target, self.quick)
            way, slope = self.sketch.norms(units, rest)
            way = way.float() / self.sketch.shrink.float().clamp(min=_LEAST_SHRINK)
        else:
            gradient = self.network.units(slopes, label, target, x.dtype)
            if len(self.network.layers) > 1:
                gradient = gradient @ self.network.layers[0].weight
            slope = gradient.norm(dim=2) * (1 + gamma(gradient.shape[2] + 4)) + TINY_NORM
            way = x.new_zeros(*target.shape, 0)
        return own - other - lost * OUTWARD - TINY, (slope + slope_error) * OUTWARD, way

    def floor(self, label: Tensor, target: Tensor) -> Tensor:
        """Lower bounds of margins over all of R^n, from the range of the last activation.

        Args:
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.

        Returns:
            ``(pairs,)``; minus infinity where there is none.
        """
        return self.of_classes(self._floor, label, target)

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
        value_error, slope_error, deviation = self.errors(
            pairs.label, pairs.target, point.norm(dim=1)
        )
        distance, steepness = away.norm(dim=1) + TINY_NORM, gradient.norm(dim=1)
        value = margin + (gradient * away).sum(1) - k / 2 * distance**2
        terms = gamma(away.shape[1] + 8)
        size = margin.abs() + steepness * distance + k * distance**2
        lost = value_error + slope_error * distance + terms * size + deviation
        value = value - lost * OUTWARD - TINY
        direction = k[:, None] * away - gradient
        error = (slope_error + terms * (steepness + k * distance)) * OUTWARD
        return Minorant(value, direction, error, k, pairs.room)

    def is_adversarial(self, pairs: Pairs, point: Tensor) -> Tensor:
        """Whether a margin is proved not to be positive at a point.

        Args:
            pairs: the margins.
            point: ``(pairs, n)``.

        Returns:
            ``(pairs,)`` bool.
        """
        margin, _ = self.network.margin_and_units(point, pairs.label, pairs.target)
        value_error, _, deviation = self.errors(pairs.label, pairs.target, point.norm(dim=1))
        return margin + value_error + deviation <= 0

    def _floor(self, weights: Tensor, offset: Tensor) -> Tensor:
        if len(self.network.layers) == 1:
            return torch.where((weights == 0).all(1), offset, -torch.inf)
        low, high = self.network.layers[-2].activation.value_range
        lowest = torch.where(weights > 0, weights * low, weights * high)
        lowest = torch.where(weights == 0, 0.0, lowest)
        size = lowest.abs().sum(1) + 2 * offset.abs()
        floor = lowest.sum(1) + offset - gamma(weights.shape[1] + 8) * size
        floor = floor - self.rounding.deviation(weights)
        return torch.where(floor.isnan(), -torch.inf, floor)

    def of_classes(self, function, label: Tensor, target: Tensor) -> Tensor:
        """What depends on a pair's classes alone, evaluated once for each two classes."""
        label, target, place = self.network.distinct_pairs(label, target)
        bias = self.network.layers[-1].bias
        offset = bias[label] - bias[target]
        return function(self.network.margin_weights(label, target), offset)[..., place]

    def errors(
        self, label: Tensor, target: Tensor, x_norm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What has to be subtracted from evaluations of margins.

        Args:
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.
            x_norm: ``(pairs,)`` norms of the points evaluated.

        Returns:
            ``(pairs,)`` bounds of the error of f, of that of its gradient in the l2 norm, and of
            how far the margin torch evaluates can be from f.
        """

        def sizes(weights: Tensor, offset: Tensor) -> Tensor:
            deviation = self.rounding.deviation(weights)
            return torch.stack([weights.norm(dim=1), offset.abs(), deviation])

        weight_norm, offset, deviation = self.of_classes(sizes, label, target)
        value, slope = self.rounding.errors(x_norm, weight_norm, offset)
        return value, slope, deviation


@remembered
def _sketch(network: Network) -> NormSketch | None:
    return NormSketch.of(network.layers[0].weight) if len(network.layers) > 1 else None


@remembered
def _remainder(network: Network) -> Remainder | None:
    sketch, (first, *rest) = _sketch(network), network.layers
    if sketch is None or len(rest) > 1 or network.classes > _FEW_CLASSES:
        return None
    # Slopes follow the preactivations, which move along the left singular vectors.
    alike = torch.ones_like(first.bias), first.activation.slope(first.bias)
    near = torch.cat([torch.stack(alike, dim=1), sketch.image[:, -_ALIKE:]], dim=1)
    classes = torch.arange(network.classes, device=network.device)
    rows = network.margin_weights(*torch.combinations(classes).T)
    return Remainder.of(first.weight, sketch, rows, near)


def _place(label: Tensor, target: Tensor, classes: int) -> Tensor:
    """Where pairs of different classes are among all, in whichever order."""
    low, high = label.minimum(target), label.maximum(target)
    return low * (2 * classes - low - 1) // 2 + high - low - 1
