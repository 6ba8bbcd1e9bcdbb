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

**Which parabolas.** Any will do: :mod:`crcbook.stages.parabolas` looks for good ones. Only
:math:`\beta_i` is proved, from the ranges of :math:`\sigma''` between the points of a grid: as an
offset of a line is in :mod:`crcbook.proof.lines`, with :math:`a_i\sigma'' + s_i` for the bend.

**Which units.** Units whose activation hardly moves in the ball take their worst value. The
others' rows are factored, :math:`W = MQ + E` with as many columns of M as rows at most; with
:math:`u = Q\delta`, :math:`\|u\| \le \|Q\|\rho`, the rest :math:`\tau = \|E\|\rho` and the error of
the computed m cost :math:`\tau(\|\alpha\| + \max|s_i| (\|M\|_F\|u\| + \tau))`.

**Intervals.** The preactivations of the upper layers are such functions too. So their intervals
shrink by the same bound, layer by layer, before the margin is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.activations import Activation
from crcbook.networks import Layer
from crcbook.proof.arithmetic import OUTWARD, TINY, TINY_NORM, UNIT, gamma
from crcbook.proof.lines import Balls, Curve, Factor, bends, down, grid, size_bound

PIECES = 32  # of an interval, between the points of its grid
LARGEST = 256  # order of the matrices: beyond it, lines have to do
_STILL = 1e-2  # of the range that moves most: what a unit's activation hardly moves
_SLACKS = (0.0, 1e-6, 1e-3)  # of the largest eigenvalue, above a multiplier
_CHUNK_VALUES = 2**21


@dataclass(frozen=True)
class BentBalls(Balls):
    """Balls in which functions of the activations are bounded by parabolas, too.

    Attributes:
        guess: proposes the parabolas; without one there are lines alone.
    """

    guess: "Guess | None" = None

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
            functions = torch.cat([units, units + len(layer.bias)])
            low, high = self._by_parabolas(*rows, ball, functions, torch.inf).chunk(2)
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
                better = self._by_parabolas(*few, ball, short, 0.0)
                found[ball, short] = found[ball, short].fmax(better)
        return found

    def _by_parabolas(
        self, rows: Tensor, offset: Tensor, ball: int, functions: Tensor, goal: float
    ) -> Tensor:
        """``(functions,)`` lower bounds of ``(1, functions, width)`` functions in one ball."""
        found = torch.full_like(offset[0], -torch.inf)
        if self.guess is None:
            return found
        units = Units.of(self, ball)
        if not units.few:
            return found
        rows, offset = self.to_first(rows, offset, slice(ball, ball + 1))
        for part in torch.arange(len(functions)).split(units.chunk):
            constant, own = units.split(rows[0, part], offset[0, part])
            parabolas = self.guess(units, constant, own, functions[part], goal)
            proved = constant + parabolas.lowest(units, own)
            proved = proved - 8 * UNIT * (constant.abs() + proved.abs())
            found[part] = torch.where(proved.isnan(), -torch.inf, proved)
        return found


@dataclass(frozen=True)
class Units:
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
    def of(cls, balls: Balls, ball: int) -> "Units":
        """Those of one ball, by its number among the balls."""
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
        sizes = factor.matrix, reach, off, grid(row, *known[:2], PIECES)
        return cls(row, moving, *known, *sizes, (lowest, highest))

    @property
    def few(self) -> bool:
        """Whether the matrices of these units are small enough, and not empty."""
        return 0 < self.factor.shape[1] <= LARGEST and len(self.factor) > 0

    @property
    def chunk(self) -> int:
        """How many functions to bound at once."""
        height, width = self.factor.shape
        return max(1, _CHUNK_VALUES // (max(height * 32, width * width) + 1))

    def split(self, rows: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Split linear functions of the activations between the units.

        Args:
            rows: ``(functions, width)``.
            offset: ``(functions,)``.

        Returns:
            ``(functions,)`` lower bounds of the offset and of the units that do not move, and
            ``(functions, moving)`` the rows of the others.
        """
        # The units that do not move take their worst values. With zeros for the others, and not
        # by a difference, nothing of these is rounded off.
        still = rows.index_fill(1, self.moving, 0.0)
        lowest, highest = self.ends
        rest = still.clamp(min=0) @ lowest + still.clamp(max=0) @ highest
        size = offset.abs() + still.abs() @ torch.maximum(lowest.abs(), highest.abs())
        constant = offset + rest - gamma(2 * rows.shape[1] + 16) * size * OUTWARD
        return constant, rows[:, self.moving]


@dataclass(frozen=True)
class UnitParabolas:
    r"""Slopes :math:`\alpha` and bends s of parabolas, and a multiplier :math:`\lambda`.

    Attributes:
        bend: ``(functions, moving)``.
        slope: ``(functions, moving)``.
        multiplier: ``(functions,)``.
    """

    bend: Tensor
    slope: Tensor
    multiplier: Tensor

    def offsets(self, units: Units, own: Tensor) -> Tensor:
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

    def lowest(self, units: Units, own: Tensor) -> Tensor:
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
        for slack in _SLACKS:
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


# Units, bounds of the rest, rows, the functions' positions among those that were asked for, and a
# bound that is enough.
Guess = Callable[[Units, Tensor, Tensor, Tensor, float], UnitParabolas]
