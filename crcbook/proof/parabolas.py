r"""Margins over l2 balls by parabolas below the first layer's units.

In a ball of radius :math:`\rho` around :math:`x_0`, lines carried back through the upper layers
(:mod:`crcbook.proof.lines`) leave a linear function :math:`\kappa + \sum_i a_i \sigma(z_i)` of the
first activations; with one hidden layer it is the margin itself. A line below each
:math:`a_i\sigma` forgets that all :math:`z_i` are functions of one :math:`\delta`: it assumes the
worst of each. A parabola need not be below the unit's worst, for the bends of all units are summed
with their signs. Let m be the :math:`z_i` at the input, and for any numbers :math:`s_i,
\alpha_i` let

.. math:: \beta_i \le \min_{l_i \le z \le u_i} a_i\sigma(z) + \tfrac{s_i}2 (z - m_i)^2 -
   \alpha_i (z - m_i), \qquad l_i \le z_i \le u_i \text{ in the ball}.

With :math:`w = z - m = W\delta` the function is at least :math:`\kappa + \sum\beta_i + \alpha\cdot
w - \tfrac12 w^T \mathrm{diag}(s) w`. That is a quadratic of :math:`\delta`, whose minimum over the
ball its dual bounds: for every :math:`\lambda \ge 0` with :math:`H = \lambda I - W^T
\mathrm{diag}(s) W \succeq -\epsilon I`, every y and :math:`g = W^T\alpha`,

.. math:: \min_{\|\delta\| \le \rho} g\cdot\delta - \tfrac12\delta^TW^T\mathrm{diag}(s)W\delta \ge
   -\tfrac12 g\cdot y - (\rho + 2\|y\|)\,\|g - Hy\| - \tfrac\epsilon2(\rho + \|y\|)^2 -
   \tfrac\lambda2\rho^2

(put :math:`\delta = e - y`), so that nothing has to be solved exactly.

**Which parabolas.** Those that touch :math:`a_i\sigma` where a point c of the ball puts
:math:`z_i`, with the smallest *secant curvature* :math:`s_i` that keeps them below,

.. math:: s_i = \max_{l_i \le z \le u_i} \frac{2}{(z - c_i)^2} \bigl(a_i\sigma(c_i) +
   a_i\sigma'(c_i)(z - c_i) - a_i\sigma(z)\bigr),

read off a grid: far below the largest bend on the interval where a unit saturates, and negative
where the unit only bends upward, which the sum takes off others. The next c is where the
quadratic is smallest. From the best round a gradient ascent goes on, for with the best
:math:`\beta` and :math:`\lambda` the bound is concave in s and :math:`\alpha`. All that is a
guess. Only :math:`\beta_i` is proved, from
the ranges of :math:`\sigma''` between the points of a grid: as an offset of a line is in
:mod:`crcbook.proof.lines`, with :math:`a_i\sigma'' + s_i` for the bend.

**Which units.** Units whose activation hardly moves in the ball take their worst value. The
others' rows are factored, :math:`W = MQ + E` with as many columns of M as rows at most; with
:math:`u = Q\delta`, :math:`\|u\| \le \|Q\|\rho`, the rest :math:`\tau = \|E\|\rho` and the error of
the computed m cost :math:`\tau(\|\alpha\| + \max|s_i| (\|M\|_F\|u\| + \tau))`.

**Intervals.** The preactivations of the upper layers are such functions too. So their intervals
shrink by the same bound, layer by layer, before the margin is asked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from crcbook.activations import Activation
from crcbook.networks import Layer
from crcbook.power_iteration import eigenpairs_estimate
from crcbook.proof.arithmetic import OUTWARD, TINY, TINY_NORM, UNIT, gamma
from crcbook.proof.lines import Balls, Curve, Factor, bends, down, grid, size_bound

_PIECES = 32  # of an interval, between the points of its grid
_LARGEST = 256  # order of the matrices: beyond it, lines have to do
_STILL = 1e-2  # of the range that moves most: what a unit's activation hardly moves
_DESCENT, _NEWTON = 8, 6
_SMOOTH, _RATE, _MEMORY = 0.02, 0.3, (0.8, 0.95)
_NEAR = 1e-3  # of an interval: where a secant is too short to be read off
_SLACKS = (1e-6, 1e-3)  # of the largest eigenvalue, above its estimate
_CHUNK_VALUES = 2**21


@dataclass(frozen=True)
class _Effort:
    """How long to look for parabolas: rounds of secants, then steps of ascent up to a goal.

    The steps of one ascent decompose matrices of so many entries at most, all together.
    """

    rounds: int
    steps: int
    goal: float
    entries: float


_INSIDE, _AT_THE_END = _Effort(2, 8, torch.inf, 2**20), _Effort(5, 40, 0.0, torch.inf)


@dataclass(frozen=True)
class BentBalls(Balls):
    """Balls in which functions of the activations are bounded by parabolas, too."""

    def ends(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Where the preactivations of the next layer stay; of units that move, more closely."""
        lower, upper = super().ends(layer)
        lowest, highest = layer.activation.value_interval(lower, upper)
        moved = highest - lowest
        moved = moved > _STILL * moved.amax(1, keepdim=True)
        for ball in range(len(self.x)):
            units = moved[ball].nonzero().squeeze(1)
            if not len(units):
                continue
            weight, bias = layer.weight[units], layer.bias[units]
            rows = torch.cat([weight, -weight])[None], torch.cat([bias, -bias])[None]
            low, high = self._by_parabolas(*rows, ball, _INSIDE).chunk(2)
            lower[ball, units] = lower[ball, units].fmax(low)
            upper[ball, units] = upper[ball, units].fmin(-high)
        return lower, upper

    def lowest(self, rows: Tensor, offset: Tensor) -> Tensor:
        """Lower bounds of linear functions of the last layer's activations, in the balls.

        Args:
            rows: ``(balls, functions, width)``.
            offset: ``(balls, functions)``.

        Returns:
            ``(balls, functions)``; where lines alone prove a function positive, theirs.
        """
        found = self.by_lines(rows, offset)
        if not self.stages:
            return found
        for ball in range(len(self.x)):
            short = (found[ball] <= 0).nonzero().squeeze(1)
            if len(short):
                few = rows[ball, short][None], offset[ball, short][None]
                better = self._by_parabolas(*few, ball, _AT_THE_END)
                found[ball, short] = found[ball, short].fmax(better)
        return found

    def _by_parabolas(self, rows: Tensor, offset: Tensor, ball: int, effort: "_Effort") -> Tensor:
        """``(functions,)`` lower bounds of ``(1, functions, width)`` functions in one ball."""
        found = _Units.of(self, ball)
        if min(found.factor.shape) == 0 or found.factor.shape[1] > _LARGEST:
            return torch.full_like(offset[0], -torch.inf)
        rows, offset = self.to_first(rows, offset, slice(ball, ball + 1))
        parts = rows[0].split(found.chunk), offset[0].split(found.chunk)
        return torch.cat([found.lowest(*part, effort) for part in zip(*parts, strict=True)])


@dataclass(frozen=True)
class _Units:
    """The first layer's units in one ball, those that move apart from the others.

    Attributes:
        row: their activation.
        moving: positions of the units that move.
        low: ``(moving,)`` lower ends of their preactivations.
        high: upper ends.
        middle: m, as computed.
        factor: of their rows, M.
        radius: a bound of the length of u.
        off: a bound of the l2 norm of what w is away from Mu.
        points: ``(points, moving)`` a grid from ``low`` to ``high``.
        ends: ``(width,)`` lower and upper bounds of all activations.
    """

    row: Activation
    moving: Tensor
    low: Tensor
    high: Tensor
    middle: Tensor
    factor: Tensor
    radius: Tensor
    off: Tensor
    points: Tensor
    ends: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, balls: Balls, ball: int) -> "_Units":
        assert balls.first is not None  # who asks for parabolas has a hidden layer
        layer, radius = balls.stages[0].layer, balls.centre.radius[ball]
        low, high = balls.first[0][ball], balls.first[1][ball]
        lowest, highest = layer.activation.value_interval(low, high)
        moved = highest - lowest
        moving = (moved > _STILL * moved.max()).nonzero().squeeze(1)
        factor = Factor.of(layer.weight[moving])
        off = (balls.centre.error[ball] + factor.error * radius) * OUTWARD + TINY_NORM
        reach = factor.stretch * radius * OUTWARD + TINY_NORM
        known = low[moving], high[moving], balls.centre.point[ball, moving]
        row = layer.activation.take(moving)
        sizes = factor.matrix, reach, off, grid(row, *known[:2], _PIECES)
        return cls(row, moving, *known, *sizes, (lowest, highest))

    @property
    def chunk(self) -> int:
        """How many functions to bound at once."""
        height, width = self.factor.shape
        return max(1, _CHUNK_VALUES // (max(height * 32, width * width) + 1))

    def lowest(self, rows: Tensor, offset: Tensor, effort: "_Effort") -> Tensor:
        """Lower bounds of linear functions of the activations.

        Args:
            rows: ``(functions, width)``.
            offset: ``(functions,)``.
            effort: of the search for parabolas.

        Returns:
            ``(functions,)``; minus infinity where nothing was proved.
        """
        own = rows[:, self.moving]
        # Of the others, and of nothing else: the worst values.
        still = rows.index_fill(1, self.moving, 0.0)
        lowest, highest = self.ends
        rest = still.clamp(min=0) @ lowest + still.clamp(max=0) @ highest
        size = offset.abs() + still.abs() @ torch.maximum(lowest.abs(), highest.abs())
        constant = offset + rest - gamma(2 * rows.shape[1] + 16) * size * OUTWARD
        scale = own.abs() @ torch.maximum(lowest.abs(), highest.abs())[self.moving]
        enough = effort.goal - constant + 1e-6 * scale
        found = constant + _Guesses(self).parabolas(own, enough, effort).lowest(self, own)
        found = found - 8 * UNIT * (constant.abs() + found.abs())
        return torch.where(found.isnan(), -torch.inf, found)


@dataclass(frozen=True)
class _Guesses:
    """Parabolas that are likely to prove much; nothing rests on them."""

    units: _Units

    def parabolas(self, own: Tensor, enough: Tensor, effort: "_Effort") -> "_Parabolas":
        """Parabolas that are likely to prove much, or enough; they may be any."""
        row, matrix, middle = self.units.row, self.units.factor, self.units.middle
        u = own.new_zeros(len(own), matrix.shape[1])
        for _ in range(_DESCENT):
            gradient = (own * row.slope(middle + u @ matrix.T)) @ matrix
            u = -self.units.radius * normalize(gradient, dim=1, eps=TINY)
        best = torch.full_like(own[:, 0], -torch.inf)
        found = _Parabolas(torch.zeros_like(own), torch.zeros_like(own), torch.zeros_like(best))
        for number in range(effort.rounds):
            z = (middle + u @ matrix.T).clamp(self.units.low, self.units.high)
            bend, away, tilt = self._secants(own, z), z - middle, own * row.slope(z)
            slope = tilt + bend * away
            constant = (own * row.value(z) - tilt * away - bend * away.square() / 2).sum(1)
            least, multiplier, lowest = self._trust_region(bend, slope @ matrix)
            better = constant + least > best
            best = torch.where(better, constant + least, best)
            found = found.where(better, _Parabolas(bend, slope, multiplier))
            u = lowest if number % 2 == 0 else (u + lowest) / 2
        short = (best <= enough).nonzero().squeeze(1)
        entries = len(short) * matrix.shape[1] ** 2
        steps = int(min(effort.steps, effort.entries // max(1, entries)))
        if steps and len(short):
            start = _Parabolas(found.bend[short], found.slope[short], found.multiplier[short])
            rest = self._ascended(own[short], start, steps)
            found.bend[short], found.slope[short] = rest.bend, rest.slope
            found.multiplier[short] = rest.multiplier
        return found

    def _ascended(self, own: Tensor, start: "_Parabolas", steps: int) -> "_Parabolas":
        """Parabolas that prove more, by Adam (Kingma & Ba 2015) on bends and slopes.

        What they prove is concave in both; its supergradient is that of the points where the
        minima are attained. Those of the units are smoothed, less and less, over the grid.
        """
        height = own * self.units.row.value(self.units.points)[:, None]
        away = (self.units.points - self.units.middle)[:, None]
        half = (self.units.high - self.units.low) / 2 + TINY_NORM
        size = own.abs() + TINY_NORM
        scale = torch.stack([size / half.square(), size / half])
        now, found = torch.stack([start.bend, start.slope]), start
        mean, square = torch.zeros_like(now), torch.zeros_like(now)
        best = torch.full_like(own[:, 0], -torch.inf)
        for step in range(steps):
            (bend, slope), left = now, 1 - step / steps
            over = height + bend / 2 * away.square() - slope * away
            least = over.amin(0)
            value, multiplier, u = self._trust_region(bend, slope @ self.units.factor)
            better = least.sum(1) + value > best
            best = torch.where(better, least.sum(1) + value, best)
            found = found.where(better, _Parabolas(bend, slope, multiplier))
            share = torch.softmax((least - over) / (_SMOOTH * left * size), dim=0)
            w = u @ self.units.factor.mT
            rise = (share * away.square()).sum(0) - w.square(), 2 * (w - (share * away).sum(0))
            rise = torch.stack(rise) / 2 * scale
            mean, square = (
                memory * past + (1 - memory) * new
                for memory, past, new in zip(
                    _MEMORY, (mean, square), (rise, rise.square()), strict=True
                )
            )
            fresh = [1 - memory ** (step + 1) for memory in _MEMORY]
            turn = mean / fresh[0] / ((square / fresh[1]).sqrt() + 1e-3 * size)
            now = now + _RATE * (0.1 + 0.9 * left) * scale * turn
        return found

    def _secants(self, own: Tensor, z: Tensor) -> Tensor:
        """Secant curvatures at ``(functions, moving)`` preactivations, as a grid sees them."""
        row, points = self.units.row, self.units.points
        value, slope, width = row.value(z), row.slope(z), self.units.high - self.units.low
        found = -own * row.bend(z)
        for point, height in zip(points, row.value(points), strict=True):
            away = point - z
            secant = own * (value + slope * away - height) * 2 / away.square()
            found = torch.where(away.abs() > _NEAR * width, found.maximum(secant), found)
        return found.nan_to_num(0.0, 0.0, 0.0)

    def _trust_region(self, bend: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """About the least value of a quadratic in the ball, its multiplier, and where it is.

        From below, where one eigenvector alone would fill the ball, Newton's method for the length
        of y (Moré & Sorensen 1983) rises to the multiplier.
        """
        radius, factor = self.units.radius, self.units.factor
        matrix = (factor.mT * bend[:, None]) @ factor
        values, vectors = eigenpairs_estimate(matrix)
        parts = (gradient[:, None] @ vectors)[:, 0]
        slack = _SLACKS[0] * values.abs().amax(1)
        multiplier = torch.maximum(values[:, -1] + slack, (values + parts.abs() / radius).amax(1))
        multiplier = multiplier.clamp(min=0)
        for _ in range(_NEWTON):
            gaps = multiplier[:, None] - values
            y = parts / gaps
            length, turned = y.norm(dim=1), (y.square() / gaps).sum(1)
            step = length.square() / turned * (length / radius - 1)
            multiplier = (multiplier + step.nan_to_num(0.0, 0.0, 0.0)).clamp(min=0)
        y = parts / (multiplier[:, None] - values)
        least = -(parts * y).sum(1) / 2 - multiplier * radius.square() / 2
        u = -(vectors @ y[:, :, None])[:, :, 0]
        u = u * (radius / u.norm(dim=1).clamp(min=TINY)).clamp(max=1)[:, None]
        return least, multiplier, u.nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class _Parabolas:
    r"""Slopes :math:`\alpha` and bends s of parabolas, and a multiplier :math:`\lambda`.

    Attributes:
        bend: ``(functions, moving)``.
        slope: ``(functions, moving)``.
        multiplier: ``(functions,)``.
    """

    bend: Tensor
    slope: Tensor
    multiplier: Tensor

    def where(self, chosen: Tensor, others: "_Parabolas") -> "_Parabolas":
        """Others where they are chosen, these elsewhere."""
        return _Parabolas(
            torch.where(chosen[:, None], others.bend, self.bend),
            torch.where(chosen[:, None], others.slope, self.slope),
            torch.where(chosen, others.multiplier, self.multiplier),
        )

    def offsets(self, units: _Units, own: Tensor) -> Tensor:
        r""":math:`\beta`, rounded down, ``(functions, moving)``."""
        row, points, bend, slope = units.row, units.points[:, None], self.bend, self.slope
        away = points - units.middle
        low, high = (own * end[:, None] for end in bends(row, units.points))
        steep = torch.maximum(low.abs(), high.abs()) + bend.abs()
        low, high = torch.minimum(low, high) + bend, torch.maximum(low, high) + bend
        curve = Curve(
            points,
            own * row.value(points) + bend / 2 * away.square() - slope * away,
            own * row.slope(points) + bend * away - slope,
            low - (OUTWARD - 1) * steep,
            high + (OUTWARD - 1) * steep,
        )
        far = torch.maximum(units.high - units.middle, units.middle - units.low).abs() * OUTWARD
        size = own.abs() * size_bound(row, units.low, units.high)
        size = size + (bend.abs() * far + slope.abs()) * far
        return down(curve.floor(torch.zeros_like(slope)), size * OUTWARD)

    def lowest(self, units: _Units, own: Tensor) -> Tensor:
        """``(functions,)`` lower bounds of the moving units' share, as the module derives them."""
        matrix, radius, order = units.factor, units.radius, units.factor.shape[1]
        beta, terms = self.offsets(units, own), gamma(2 * len(units.factor) + 16)
        constant = beta.sum(1) - terms * beta.abs().sum(1)
        length = self.slope.norm(dim=1) * OUTWARD + TINY_NORM
        size, steep = matrix.norm() * OUTWARD + TINY_NORM, self.bend.abs().amax(1)
        gradient = self.slope @ matrix
        product = (matrix.mT * self.bend[:, None]) @ matrix
        total = (self.bend.abs() @ matrix.square().sum(1)) * OUTWARD
        matrix_error = 2 * (max(matrix.shape) + 8) * UNIT * total
        lost = units.off * (length + steep * (size * radius + units.off))
        lost = lost + terms * size * length * radius
        best = torch.full_like(constant, -torch.inf)
        identity = torch.eye(order, dtype=matrix.dtype, device=matrix.device)
        for slack in (0.0, *_SLACKS):
            multiplier = (self.multiplier + slack * total).clamp(min=0)
            shifted = multiplier[:, None, None] * identity - product
            factor, failed = torch.linalg.cholesky_ex(shifted)
            y = torch.cholesky_solve(gradient[:, :, None], factor)[:, :, 0]
            away = y.norm(dim=1) * OUTWARD + TINY_NORM
            rest = (gradient - (shifted @ y[:, :, None])[:, :, 0]).norm(dim=1)
            rest = rest * OUTWARD + gamma(order + 8) * (multiplier + total) * away
            rest = rest + matrix_error * away + gamma(8) * gradient.norm(dim=1)
            # The shifted matrix may have eigenvalues this little below 0.
            below = matrix_error + 4 * (order + 4) * UNIT * (order * multiplier + total)
            reach = radius + away
            half = (gradient * y).sum(1) / 2
            half = half + gamma(order + 8) * gradient.norm(dim=1) * away
            fall = half + rest * (reach + away) + below * reach.square() / 2
            fall = fall + multiplier * radius.square() / 2 + lost * OUTWARD
            error = 64 * UNIT * (constant.abs() + half.abs() + fall.abs())
            found = torch.where(failed == 0, constant - fall - error - TINY, -torch.inf)
            best = best.fmax(found)
            if (failed == 0).all():
                break
        return best
