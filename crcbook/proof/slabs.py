r"""Margins over a ball that is cut into slabs.

One quadratic for a whole ball needs a curvature that holds in all of it, and loses
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
from crcbook.power_iteration import top_eigenvalue_estimate
from crcbook.proof.arithmetic import DOUBLE, INSIDE, OUTWARD, TINY, UNIT, gamma
from crcbook.proof.curvature import bend_depths, upper_terms
from crcbook.proof.eigenvalues import top_eigenvalue_bound
from crcbook.proof.intervals import activation_ranges, preactivation_intervals
from crcbook.proof.prover import Entries, Prover, evaluate
from crcbook.proof.shells import SHELLS, shells

_STEPS = 12
_POWER_STEPS = 12  # of a guess that a proof tries first; nothing rests on it
_LIKELY = 0.9  # of the ball's curvature: a slab's, before it is known
_CHUNK_ENTRIES = 32


def slab_margins(prover: Prover, entries: Entries, axis: Tensor, slabs: int = 8) -> Tensor:
    """Proved lower bounds of margins over l2 balls.

    Args:
        prover: the network, which has a hidden layer, prepared for proofs.
        entries: the margins, with the balls' radii as what their curvatures are valid for: in the
            whole balls, without a box.
        axis: ``(entries, n)`` directions to cut across, of any length, such as those in which the
            margins fall.
        slabs: how many, of equal width; the first one goes on to the other end of the ball.

    Returns:
        ``(entries,)`` positive bounds; minus infinity where a slab is not proved positive, for the
        others are not looked at then.
    """
    if entries.allowed is not None:
        raise ValueError("slabs cut whole balls, where a curvature in a box does not hold")
    axis = _unit(axis)
    least = torch.full_like(entries.valid, torch.inf)
    left = torch.arange(len(least), device=least.device)
    for place in reversed(range(slabs)):  # where the margin is smallest, a proof fails soonest
        ends = place / slabs, (place + 1) / slabs
        margin = _Slab.of(prover, entries.take(left), axis[left], *ends).margins()
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
    entries: Entries
    radius: Tensor
    axis: Tensor  # of about unit length
    low: Tensor
    high: Tensor
    width: Tensor  # l, across the axis

    @classmethod
    def of(cls, prover: Prover, entries: Entries, axis: Tensor, low: float, high: float) -> "_Slab":
        radius = entries.valid
        whole, low, high = low == 0, radius * low, radius * high
        # An axis that is not quite of unit length counts as one in a slightly larger ball.
        square = radius.square() * (1 + 8 * gamma(axis.shape[1] + 16))
        width = (square - low.square()).sqrt() * OUTWARD
        low = -radius * OUTWARD if whole else low
        return cls(prover, entries, radius, axis, low, high * OUTWARD, width)

    def take(self, index: Tensor) -> "_Slab":
        columns = self.radius, self.axis, self.low, self.high, self.width
        return _Slab(self.prover, self.entries.take(index), *(column[index] for column in columns))

    def margins(self) -> Tensor:
        """Lower bounds in the slabs: with the ball's curvature, or where that fails their own."""
        curvature = self.entries.curvature
        bound = self._quadratics(self._expansion_points(curvature), curvature)
        short = (bound <= 0).nonzero().squeeze(1)
        for part in short.split(_CHUNK_ENTRIES) if len(short) else ():
            slab = self.take(part)
            d = slab._expansion_points(_LIKELY * curvature[part])
            bound[part] = bound[part].fmax(slab._with_own_curvature(d))
        return bound

    def _with_own_curvature(self, d: Tensor) -> Tensor:
        """Lower bounds with the slabs' curvatures; minus infinity where none can be positive."""
        diagonal, upper = self._bends(d)
        top = self._top_estimate(d, diagonal)
        bound = torch.full_like(self.radius, -torch.inf)
        # With the estimate itself no slab would gain more; then a quick proof of it, then a close.
        left = (self._quadratics(d, self._least(top + upper)) > 0).nonzero().squeeze(1)
        for guess in (top, None):
            if len(left):
                near = None if guess is None else guess[left]
                weight = self.prover.network.layers[0].weight
                proved = top_eigenvalue_bound(weight, diagonal[left], near)
                slab = self.take(left)
                k = slab._least((proved + upper[left]) * OUTWARD)
                bound[left] = slab._quadratics(d[left], k)
                left = left[bound[left] <= 0]
        return bound

    def _least(self, curvature: Tensor) -> Tensor:
        """A slab's curvature, or the ball's where that is smaller."""
        return self.entries.curvature.fmin(curvature)

    def _expansion_points(self, curvature: Tensor) -> Tensor:
        """Displacements to the slabs' middles, about the best across the axis for a curvature."""
        rough, dtype = self.prover.rough, self.prover.rough.dtype
        entries, axis = self.entries, self.axis.to(dtype)
        along = ((self.low.clamp(min=0) + self.high) / 2).to(dtype)
        middle = along[:, None] * axis
        across, acceleration = torch.zeros_like(axis), Acceleration()
        for _ in range(_STEPS):
            gradient = evaluate(rough, entries, middle + across).gradient
            gradient = gradient - (gradient * axis).sum(1, keepdim=True) * axis
            move = -gradient / curvature[:, None].to(dtype) - across
            across = across + acceleration.step(across, move)
        along, across = along.double(), across.double().nan_to_num(0.0, 0.0, 0.0)
        across = across - (across * self.axis).sum(1, keepdim=True) * self.axis
        room = (self.radius.square() - along.square()).clamp(min=0).sqrt() * INSIDE
        across = across * (room / across.norm(dim=1).clamp(min=TINY)).clamp(max=1)[:, None]
        return INSIDE * (along[:, None] * self.axis + across)

    def _quadratics(self, d: Tensor, curvature: Tensor) -> Tensor:
        entries = replace(self.entries, curvature=curvature)
        quadratic, _ = self.prover.prove(entries, d)
        direction, terms = quadratic.direction, gamma(8 * d.shape[1] + 128)
        slope = (direction * self.axis).sum(1)
        along = torch.maximum(self.low * slope, self.high * slope)
        across = (direction - slope[:, None] * self.axis).norm(dim=1) * self.width
        fall = along + across + curvature / 2 * self.radius.square()
        size = quadratic.value.abs() + (
            direction.norm(dim=1) * self.radius + curvature * self.radius.square()
        )
        lost = (quadratic.error + DOUBLE.tiny_norm) * self.radius * OUTWARD + terms * size + TINY
        return quadratic.value - fall - lost * OUTWARD

    def _bends(self, away: Tensor) -> tuple[Tensor, Tensor]:
        """The curvature of the slabs as seen from the points.

        Returns ``(pairs, width)`` the diagonal of the first layer's term, and ``(pairs,)`` what the
        layers above add.
        """
        prover, network = self.prover, self.prover.network
        point = self.entries.x + away
        along = (away * self.axis).sum(1)
        across = (away - along[:, None] * self.axis).norm(dim=1)
        reach = torch.maximum(self.high - along, along - self.low).square()
        reach = (reach + (self.width + across).square()).sqrt()
        # The point of expansion is not quite where the network is evaluated.
        rounded = 4 * UNIT * (self.entries.x.norm(dim=1) + point.norm(dim=1)) + DOUBLE.tiny_norm
        reach = reach * (OUTWARD + 16 * gamma(point.shape[1] + 16)) + rounded
        ends, share = shells(reach)
        item = torch.arange(len(point), device=point.device).repeat_interleave(SHELLS)
        radii = (reach[:, None] * ends).reshape(-1)
        low, high = self._first_preactivations()
        limits = low[item], high[item]
        intervals = preactivation_intervals(prover.rounding, point[item], radii, first=limits)
        ranges = activation_ranges(network, intervals)
        weights = network.margin_weights(self.entries.label, self.entries.target)[item]
        first, *inner = bend_depths(network.layers, weights, ranges)
        first = first.reshape(len(point), SHELLS, -1).cummax(1).values
        # The shares add up to 1 with an error that a negative entry must not gain from.
        slack = 4 * (OUTWARD - 1) * first.abs().amax(1)
        diagonal = (share[:, None] * first).sum(1) + slack
        upper = radii.new_zeros(len(item)) + upper_terms(prover.rounding, inner, ranges)
        upper = (share * upper.reshape(-1, SHELLS).cummax(1).values).sum(1)
        return diagonal, upper

    def _top_estimate(self, away: Tensor, diagonal: Tensor) -> Tensor:
        """Estimates of the first layer's term, from below: enough to give a slab up."""
        matrix, depths = [self.prover.network.layers[0].weight], diagonal.clamp(min=0)
        _, vector = top_eigenvalue_estimate(matrix, depths, away, _POWER_STEPS)
        top, _ = top_eigenvalue_estimate(matrix, diagonal, vector, steps=0)
        return top.clamp(min=0)

    def _first_preactivations(self) -> tuple[Tensor, Tensor]:
        """How low and high the first layer's preactivations can be in the slabs."""
        layer, x = self.prover.network.layers[0], self.entries.x
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
