r"""Margins over a ball that is cut into slabs.

One minorant for a whole ball needs a curvature that holds in all of it, and loses
:math:`\tfrac k2 \|x - c\|^2` at every point x away from its point of expansion c. Cut across a
direction u, the ball :math:`\|\delta\| \le \rho` becomes slabs
:math:`a \le u\cdot\delta \le b`, each with a point of its own and a curvature of its own.

Let c lie in the slab, and let every point of the slab be within T of it. Let
:math:`\nabla^2 f \succeq -A(t)` where the slab is within t of c, with A nondecreasing. Taylor's
theorem with the remainder in integral form, along the segment from c to :math:`x = x_0 + \delta`,
gives on the slab

.. math:: f(x) \ge f(c) + \nabla f(c) \cdot (x - c) - \tfrac k2 \|x - c\|^2, \qquad
   k = \lambda_{\max}\Bigl(\sum_i w_i A(t_i)\Bigr), \quad
   w_i = (1 - t_{i-1}/T)^2 - (1 - t_i/T)^2,

for radii :math:`0 = t_0 < \dots < t_m = T`: what lies near c counts most, and there the bends of
the units are nearly those at c. With :math:`q` and :math:`s` as in :mod:`crcbook.proof.quadratic`
the right-hand side is :math:`q - s\cdot\delta - \tfrac k2\|\delta\|^2`, and on the slab that is at
least

.. math:: q - \max(a\beta, b\beta) - l\,\|s - \beta u\| - \tfrac k2 \rho^2, \qquad
   \beta = s\cdot u, \quad l^2 = \rho^2 - \min_{[a, b]} t^2 .

The best c of a slab makes the part of s across u vanish; a few steps look for it, and nothing rests
on their success. With a first layer :math:`z = Wx + b`, the slab moves unit j by at most
:math:`[a, b]\,w_j\cdot u` and l times the rest of its row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crcbook.acceleration import Acceleration
from crcbook.proof.arithmetic import OUTWARD, TINY, TINY_NORM, gamma
from crcbook.proof.curvature import SHELLS, activation_ranges, bend_depths, shells, upper_terms
from crcbook.proof.eigenvalues import top_eigenvalue_bound, top_eigenvalue_estimate
from crcbook.proof.quadratic import Pairs, Prover

_STEPS = 12
_POWER_STEPS = 6
_INSIDE = 1 - 1e-9  # of the ball's radius: where points of expansion stay
_LIKELY = 0.9  # of the ball's curvature: a slab's, before it is known
_CHUNK_PAIRS = 32


def slab_margins(
    prover: Prover,
    pairs: Pairs,
    radius: Tensor,
    axis: Tensor,
    slabs: int = 8,
) -> Tensor:
    """Proved lower bounds of margins over l2 balls.

    Args:
        prover: the float64 network, which has a hidden layer, with its error bounds.
        pairs: the margins, with curvatures that hold in the balls; a box is left aside.
        radius: ``(pairs,)`` the balls' l2 radii.
        axis: ``(pairs, n)`` directions to cut across, of any length, such as those in which the
            margins fall.
        slabs: how many, of equal width; the first one goes on to the other end of the ball.

    Returns:
        ``(pairs,)`` positive bounds; minus infinity where a slab is not proved positive, for the
        others are not looked at then.
    """
    pairs, axis = replace(pairs, room=None), _unit(axis)
    least = torch.full_like(radius, torch.inf)
    left = torch.arange(len(radius), device=radius.device)
    for place in range(slabs):
        ends = place / slabs, (place + 1) / slabs
        slab = _Slab.of(prover, pairs.take(left), radius[left], axis[left], *ends)
        margin = slab.margins()
        proved = (margin > 0) & margin.isfinite()
        least[left] = torch.where(proved, torch.minimum(least[left], margin), -torch.inf)
        left = left[proved]
        if not len(left):
            break
    return least


def _unit(axis: Tensor) -> Tensor:
    """Directions of unit length, rounding apart; 0 where there is none, which cuts nothing."""
    axis = axis / axis.abs().amax(1, keepdim=True)
    return (axis / axis.norm(dim=1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class _Slab:
    """One slab of each ball."""

    prover: Prover
    pairs: Pairs
    radius: Tensor
    axis: Tensor  # of about unit length
    low: Tensor
    high: Tensor
    width: Tensor  # l, across the axis

    @classmethod
    def of(cls, prover: Prover, pairs: Pairs, radius: Tensor, axis: Tensor, low, high) -> "_Slab":
        whole, low, high = low == 0, radius * low, radius * high
        # An axis that is not quite of unit length counts as one in a slightly larger ball.
        square = radius.square() * (1 + 8 * gamma(axis.shape[1] + 16))
        width = (square - low.square()).sqrt() * OUTWARD
        low = -radius * OUTWARD if whole else low
        return cls(prover, pairs, radius, axis, low, high * OUTWARD, width)

    def take(self, index: Tensor) -> "_Slab":
        columns = self.radius, self.axis, self.low, self.high, self.width
        return _Slab(self.prover, self.pairs.take(index), *(column[index] for column in columns))

    def margins(self) -> Tensor:
        """Lower bounds in the slabs: with the ball's curvature, or where that fails their own."""
        curvature = self.pairs.curvature
        bound = self._minorants(self._expansion_points(curvature), curvature)
        short = (bound <= 0).nonzero().squeeze(1)
        for part in short.split(_CHUNK_PAIRS) if len(short) else ():
            slab = self.take(part)
            point = slab._expansion_points(_LIKELY * curvature[part])
            bound[part] = bound[part].fmax(slab._with_own_curvature(point))
        return bound

    def _with_own_curvature(self, point: Tensor) -> Tensor:
        """Lower bounds with the slabs' curvatures; minus infinity where none can be positive."""
        bends = self._bends(point)
        likely = self._minorants(point, self._least_curvature(point, *bends)) > 0
        bound = torch.full_like(self.radius, -torch.inf)
        if likely.any():
            slab, bends = self.take(likely), (part[likely] for part in bends)
            bound[likely] = slab._minorants(point[likely], slab._curvature(*bends))
        return bound

    def _expansion_points(self, curvature: Tensor) -> Tensor:
        """Points of the slabs' middles, about the best across the axis for a curvature."""
        rough, dtype = self.prover.rough, self.prover.rough.dtype
        pairs, axis = self.pairs.to(dtype), self.axis.to(dtype)
        along = ((self.low.clamp(min=0) + self.high) / 2).to(dtype)
        middle = pairs.x0 + along[:, None] * axis
        across, acceleration = torch.zeros_like(axis), Acceleration()
        for _ in range(_STEPS):
            point = middle + across
            _, gradient = rough.margin_and_gradient(point, pairs.label, pairs.target)
            gradient = gradient - (gradient * axis).sum(1, keepdim=True) * axis
            move = -gradient / curvature[:, None].to(dtype) - across
            across = across + acceleration.step(across, move)
        along, across = along.double(), across.double().nan_to_num(0.0, 0.0, 0.0)
        across = across - (across * self.axis).sum(1, keepdim=True) * self.axis
        room = (self.radius.square() - along.square()).clamp(min=0).sqrt() * _INSIDE
        across = across * (room / across.norm(dim=1).clamp(min=TINY)).clamp(max=1)[:, None]
        return self.pairs.x0 + _INSIDE * (along[:, None] * self.axis + across)

    def _minorants(self, point: Tensor, curvature: Tensor) -> Tensor:
        pairs = replace(self.pairs, curvature=curvature)
        values = self.prover.network.margin_and_gradient(point, pairs.label, pairs.target)
        minorant = self.prover.minorant(pairs, point, *values)
        direction, terms = minorant.direction, gamma(8 * point.shape[1] + 128)
        slope = (direction * self.axis).sum(1)
        along = torch.maximum(self.low * slope, self.high * slope)
        across = (direction - slope[:, None] * self.axis).norm(dim=1) * self.width
        fall = along + across + curvature / 2 * self.radius.square()
        size = minorant.value.abs() + (
            direction.norm(dim=1) * self.radius + curvature * self.radius.square()
        )
        lost = (minorant.error + TINY_NORM) * self.radius * OUTWARD + terms * size + TINY
        return minorant.value - fall - lost * OUTWARD

    def _bends(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The curvature of the slabs as seen from the points.

        Returns ``(pairs, width)`` the diagonal of the first layer's term, and ``(pairs,)`` what the
        layers above add.
        """
        prover, network = self.prover, self.prover.network
        away = point - self.pairs.x0
        along = (away * self.axis).sum(1)
        across = (away - along[:, None] * self.axis).norm(dim=1)
        reach = torch.maximum(self.high - along, along - self.low).square()
        reach = (reach + (self.width + across).square()).sqrt()
        reach = reach * (OUTWARD + 16 * gamma(point.shape[1] + 16))
        ends, share = shells(reach)
        item = torch.arange(len(point), device=point.device).repeat_interleave(SHELLS)
        radii = (reach[:, None] * ends).reshape(-1)
        limits = tuple(end[item] for end in self._first_preactivations())
        intervals = prover.rounding.preactivation_intervals(point[item], radii, first=limits)
        ranges = activation_ranges(network, intervals)
        weights = network.margin_weights(self.pairs.label, self.pairs.target)[item]
        first, *inner = bend_depths(network.layers, weights, ranges)
        first = first.reshape(len(point), SHELLS, -1).cummax(1).values
        # The shares add up to 1 with an error that a negative entry must not gain from.
        slack = 4 * (OUTWARD - 1) * first.abs().amax(1)
        diagonal = (share[:, None] * first).sum(1) + slack
        upper = upper_terms(prover.rounding, inner, ranges, len(item))
        upper = (share * upper.reshape(-1, SHELLS).cummax(1).values).sum(1)
        return diagonal, upper

    def _curvature(self, diagonal: Tensor, upper: Tensor) -> Tensor:
        """The bound k of what :meth:`_bends` found, never above the balls'."""
        weight = self.prover.network.layers[0].weight
        return self.pairs.curvature.fmin((top_eigenvalue_bound(weight, diagonal) + upper) * OUTWARD)

    def _least_curvature(self, point: Tensor, diagonal: Tensor, upper: Tensor) -> Tensor:
        """A cheap estimate of the same, from below: enough to give a slab up."""
        matrix, vector = [self.prover.network.layers[0].weight], point - self.pairs.x0
        depths = diagonal.clamp(min=0)
        _, vector = top_eigenvalue_estimate(matrix, depths, vector, _POWER_STEPS)
        top, _ = top_eigenvalue_estimate(matrix, diagonal, vector, steps=0)
        return self.pairs.curvature.fmin(top + upper)

    def _first_preactivations(self) -> tuple[Tensor, Tensor]:
        """How low and high the first layer's preactivations can be in the slabs."""
        layer, x = self.prover.network.layers[0], self.pairs.x0
        # The error also covers how far a point of expansion was rounded out of its slab.
        error = self.prover.rounding.preactivation_errors(x.norm(dim=1))[0]
        z = torch.addmm(layer.bias, x, layer.weight.T)
        rows, terms = layer.weight.norm(dim=1), gamma(8 * x.shape[1] + 128)
        tilt = self.axis @ layer.weight.T
        across = (rows.square() * (1 + terms) - tilt.square()).clamp(min=0).sqrt()
        low, high = self.low[:, None] * tilt, self.high[:, None] * tilt
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        slack = error[:, None] + terms * (z.abs() + self.radius[:, None] * rows)
        reach = (across * self.width[:, None] + slack) * OUTWARD
        return z + low - reach, z + high + reach
