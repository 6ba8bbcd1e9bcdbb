r"""Quadratics that lie below a margin, and what they prove.

Let f be the margin of a label over a target and :math:`k \ge 0` with
:math:`\nabla^2 f \succeq -kI`. At any point :math:`c = x_0 + d`, a second-order Taylor expansion
bounds f from below everywhere, and expanded again at the input :math:`x_0` it reads

.. math:: f(x_0 + \delta) \ge q - s \cdot \delta - \tfrac k2 \|\delta\|^2, \qquad
   q = f(c) - \nabla f(c) \cdot d - \tfrac k2 \|d\|^2, \quad s = -\nabla f(c) - kd.

So in the ball of radius :math:`\rho` the margin is at least :math:`q - \rho\|s\| - k\rho^2/2`, and
positive while :math:`\rho` is below :math:`2q/(\|s\| + \sqrt{\|s\|^2 + 2kq})`. Any c is proof
enough; c = x_0 gives the closed form of Entesari et al. (2024), and the best c gives the convex
dual of Singla & Feizi (2020), Theorem 1 (radius) and Theorem 2 (fixed radius).
:mod:`crcbook.theorem` has the same without rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from crcbook.proof.arithmetic import DOUBLE, OUTWARD, TINY, UNIT, Arithmetic, gamma
from crcbook.proof.box import Allowed

# The bound is flat at the best multiplier: half the digits of the precision are enough.
_BISECTIONS = {torch.float32: 12, torch.float64: 28}


@dataclass(frozen=True)
class Parabola:
    """The bound :math:`q - s r - kr^2/2` of margins at the distance r, whatever the direction.

    Attributes:
        value: ``(entries,)`` q, rounded down.
        slope: ``(entries,)`` s, rounded upward, at least 0.
        curvature: ``(entries,)`` k, at least 0.
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor

    def radius(self) -> Tensor:
        """How far the bound stays positive.

        Returns:
            ``(entries,)`` l2 radii, rounded down; 0 where q is not positive.
        """
        root = (self.slope**2 + 2 * self.curvature * self.value.clamp(min=0)).sqrt()
        radius = self.value / (self.slope + root) * 2 / OUTWARD
        return torch.where(self.value > 0, radius.nan_to_num(nan=0.0), 0.0)  # never infinite

    def margin(self, radius: Tensor) -> Tensor:
        """The smallest value of the bound up to a distance.

        Args:
            radius: ``(entries,)`` l2 distances.

        Returns:
            ``(entries,)``, rounded down; minus infinity where something overflowed.
        """
        # Three roundings of each part of the fall, its sum, and two differences: six at most.
        fall = radius * self.slope + self.curvature * (radius * radius) / 2
        margin = self.value - fall - (self.value.abs() + fall) * 8 * UNIT
        return torch.where(margin.isnan(), -torch.inf, margin)


@dataclass(frozen=True)
class Quadratic:
    r"""The bound :math:`q - s\cdot\delta - k\|\delta\|^2/2` of each entry.

    In a box the smallest value is bounded by Lagrange duality. For any :math:`\lambda \ge k` and
    every displacement of length at most :math:`\rho`, the bound is at least
    :math:`h(\lambda) - \lambda\rho^2/2` with

    .. math:: h(\lambda) = \min_{\delta \in \text{box}} q - s\cdot\delta +
       \tfrac{\lambda-k}2\|\delta\|^2, \quad\text{attained at}\quad
       \delta = \mathrm{clip}(s/(\lambda-k)),

    which is positive while :math:`\rho^2 < 2h(\lambda)/\lambda`.

    Attributes:
        value: ``(entries,)`` q, rounded down.
        direction: ``(entries, n)`` s: where the bound falls fastest.
        error: ``(entries,)`` a bound of the rounding error of s, an l2 norm.
        curvature: ``(entries,)`` k.
        allowed: the displacements that the box leaves; None for all.
        arithmetic: the format of the direction.
    """

    value: Tensor
    direction: Tensor
    error: Tensor
    curvature: Tensor
    allowed: Allowed | None = None
    arithmetic: Arithmetic = DOUBLE

    @property
    def parabola(self) -> Parabola:
        """The bound by the distance alone, with the norm of s for its slope."""
        slope = (self.arithmetic.norm(self.direction) + self.error) * OUTWARD
        return Parabola(self.value, slope, self.curvature)

    def radius(self) -> Tensor:
        """How far the bound stays positive.

        Returns:
            ``(entries,)`` l2 radii, rounded down; 0 where the bound is not positive at the input,
            infinity where it is positive in the whole box.
        """
        radius = self.parabola.radius()
        if self.allowed is not None:
            radius = radius.fmax(self._radius_in_box(self.allowed, radius) / OUTWARD)
        return torch.where(self.value > 0, radius, 0.0)

    def margin(self, radius: Tensor) -> Tensor:
        """The smallest value of the bound in a ball.

        Args:
            radius: ``(entries,)`` the balls' l2 radii.

        Returns:
            ``(entries,)``, rounded down; minus infinity where something overflowed.
        """
        margin = self.parabola.margin(radius)
        if self.allowed is not None:
            square = radius * radius
            multiplier = self.multiplier(radius, fixed=True)
            fall = multiplier * square / 2 + self.error * radius
            inner = self._smallest(multiplier)
            # Six at most, as above.
            margin = margin.fmax(inner - fall - (inner.abs() + fall) * 8 * UNIT)
        return torch.where(margin.isnan(), -torch.inf, margin)

    def nearest(self, radius: Tensor) -> Tensor:
        """Where the bound reaches zero first: the place to look for an adversary.

        Args:
            radius: ``(entries,)`` what :meth:`radius` returned.

        Returns:
            ``(entries, n)`` displacements.
        """
        if self.allowed is None:
            finite = torch.where(radius.isfinite(), radius, 0.0)
            return finite[:, None] * normalize(self.direction, dim=1, eps=TINY)
        return self._displacement(self.multiplier(radius, fixed=False))

    def _radius_in_box(self, allowed: Allowed, plain: Tensor) -> Tensor:
        multiplier = self.multiplier(plain, fixed=False)
        longest = allowed.longest()
        inner = self._smallest(multiplier)
        first = (inner.clamp(min=0) / multiplier * 2).sqrt().fmin(longest)
        # s is known within its error, which tilts the bound by at most that much a unit length.
        inner = (inner - self.error * first * OUTWARD).clamp(min=0)
        radius = torch.where(inner > 0, (inner / multiplier * 2).sqrt(), 0.0)
        return torch.where(radius > longest * OUTWARD, torch.inf, radius)

    def _smallest(self, multiplier: Tensor) -> Tensor:
        """h, rounded down."""
        delta = self._displacement(multiplier)
        linear = (self.direction * delta).sum(1)
        square = (multiplier - self.curvature) / 2 * delta.square().sum(1)
        # n + 5 roundings of each term of the two sums, and as many of the norms in their size. The
        # minimiser is rounded twice too: h is at least its value there less 2(2u)^2 of the size.
        size = self.value.abs() + self.direction.norm(dim=1) * delta.norm(dim=1) + square
        return self.value - linear + square - gamma(4 * delta.shape[1] + 32) * size - TINY

    def _displacement(self, multiplier: Tensor) -> Tensor:
        rise = (multiplier - self.curvature).clamp(min=torch.finfo(multiplier.dtype).tiny)
        delta = self.direction / rise[:, None]
        return delta if self.allowed is None else self.allowed.clip(delta)

    def multiplier(self, radius: Tensor, fixed: bool) -> Tensor:
        r"""A good :math:`\lambda`, by bisection; every :math:`\lambda \ge k` is a valid one.

        In a ball of a ``fixed`` radius the displacement has that length; otherwise
        :math:`2h(\lambda)/\lambda` is largest where it is the displacement's squared length. With
        no box it is :math:`k + \|s\|/\rho`, and a box only lowers it.

        Args:
            radius: ``(entries,)`` the balls', or where not fixed a lower bound of what is proved.
            fixed: whether the radius is that of a ball.

        Returns:
            ``(entries,)``.
        """
        low, high = self.curvature, self.curvature + self.direction.norm(dim=1) / radius
        for _ in range(_BISECTIONS[self.direction.dtype]):
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
