r"""Where to look for parabolas below units; what they prove is :mod:`crcbook.proof.parabolas`'s.

They begin as those that touch :math:`a_i\sigma` where a point c of the ball puts :math:`z_i`, with
the smallest *secant curvature* :math:`s_i` that keeps them below,

.. math:: s_i = \max_{l_i \le z \le u_i} \frac{2}{(z - c_i)^2} \bigl(a_i\sigma(c_i) +
   a_i\sigma'(c_i)(z - c_i) - a_i\sigma(z)\bigr),

read off a grid: far below the largest bend on the interval where a unit saturates, and negative
where the unit only bends upward, which the sum takes off others. The next c is where the quadratic
is smallest. From the best round a gradient ascent goes on, for with the best :math:`\beta` and
:math:`\lambda` the bound is concave in s and :math:`\alpha`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from crcbook.power_iteration import eigenpairs_estimate
from crcbook.proof.arithmetic import TINY, TINY_NORM
from crcbook.proof.lines import grid
from crcbook.proof.parabolas import PIECES, UnitParabolas, Units

_DESCENT, _NEWTON = 8, 6
_SMOOTH, _RATE, _MEMORY = 0.02, 0.3, (0.8, 0.95)
_NEAR = 1e-3  # of an interval: where a secant is too short to be read off
_ABOVE = 1e-6  # of the largest eigenvalue: where a multiplier begins
_FASTEST = 0.1  # of a radius: how much it changes in a step
_IN_THE_WAY = 1.3  # times the smallest root: which other functions might have it in the end


@dataclass(frozen=True)
class _Effort:
    """How long to look for parabolas: rounds of secants, then steps of ascent.

    Attributes:
        rounds: of secants.
        least: the number of steps, whatever they cost.
        most: the number of steps where they are cheap.
        entries: of the matrices that cheap steps decompose, all together.
    """

    rounds: int
    least: int
    most: int
    entries: float

    def steps(self, units: Units, functions: Tensor) -> int:
        """How many steps to take for some functions of the units."""
        cheap = self.entries // (len(functions) * units.factor.shape[1] ** 2)
        return int(min(max(cheap, self.least), self.most))


_INSIDE, _AT_THE_END = _Effort(2, 0, 8, 2**20), _Effort(5, 40, 100, 2**21)
_MOVING = _Effort(4, 25, 60, 2**21)


def good_parabolas(
    units: Units, constant: Tensor, own: Tensor, functions: Tensor, goal: float
) -> UnitParabolas:
    """Parabolas that are likely to prove much, or enough.

    Args:
        units: of the ball.
        constant: ``(functions,)`` what is known of the rest.
        own: ``(functions, moving)`` rows.
        functions: their positions, which do not matter here.
        goal: bounds that are enough; infinity for intervals of preactivations, where little effort
            is worth while.

    Returns:
        The parabolas.
    """
    effort = _INSIDE if goal == torch.inf else _AT_THE_END
    found, best = _Functions(units, constant, own).by_secants(effort.rounds)
    slack = 1e-6 * own.abs() @ torch.maximum(*(end.abs() for end in units.ends))[units.moving]
    short = (constant + best <= goal + slack).nonzero().squeeze(1)
    if not len(short):
        return found
    steps = effort.steps(units, short)
    if not steps:
        return found
    better, _ = _Functions(units, constant[short], own[short]).ascended(_take(found, short), steps)
    return _put(found, short, better)


def largest_ball(
    units: Units, constant: Tensor, own: Tensor, share: float
) -> tuple[UnitParabolas, float]:
    """Look for the largest ball in which functions stay positive, and for its parabolas, at once.

    Args:
        units: of a ball that is too large.
        constant: ``(functions,)`` what is known of the rest.
        own: ``(functions, moving)`` rows.
        share: of its radius, where to begin.

    Returns:
        Parabolas, and the share of the radius at which the first of their bounds seems to vanish,
        which may lie outside of the ball; 0 where nothing was found.
    """
    start, _ = _Functions(_at(units, share), constant, own).by_secants(_MOVING.rounds)
    found, roots = _Functions(units, constant, own).ascended(start, 1, share)
    roots = roots.nan_to_num(nan=0.0)  # something overflowed
    short = (roots < _IN_THE_WAY * roots.min()).nonzero().squeeze(1)
    if not len(short):
        return found, 0.0
    few = _Functions(units, constant[short], own[short])
    better, roots[short] = few.ascended(_take(found, short), _MOVING.steps(units, short), share)
    return _put(found, short, better), float(roots.nan_to_num(nan=0.0).min())


def _where(chosen: Tensor, ones: UnitParabolas, others: UnitParabolas) -> UnitParabolas:
    """The ones for the chosen functions, the others elsewhere."""
    return UnitParabolas(
        torch.where(chosen[:, None], ones.bend, others.bend),
        torch.where(chosen[:, None], ones.slope, others.slope),
        torch.where(chosen, ones.multiplier, others.multiplier),
    )


def _take(found: UnitParabolas, functions: Tensor) -> UnitParabolas:
    """Those of some functions."""
    return UnitParabolas(*(column[functions] for column in vars(found).values()))


def _put(found: UnitParabolas, functions: Tensor, others: UnitParabolas) -> UnitParabolas:
    """Others for some functions, those found for the rest."""
    columns = zip(vars(found).values(), vars(others).values(), strict=True)
    return UnitParabolas(*(whole.index_copy(0, functions, part) for whole, part in columns))


def _at(units: Units, share: float) -> Units:
    """About the units of a ball of the same centre, that share as large."""
    low, high = (units.middle + share * (end - units.middle) for end in (units.low, units.high))
    points = grid(units.row, low, high, PIECES)
    return replace(units, low=low, high=high, radius=share * units.radius, points=points)


@dataclass(frozen=True)
class _Functions:
    """Linear functions of some units, and the search for parabolas below them.

    Attributes:
        units: the units.
        constant: ``(functions,)`` what is known of the rest.
        own: ``(functions, moving)`` rows.
    """

    units: Units
    constant: Tensor
    own: Tensor

    def by_secants(self, rounds: int) -> tuple[UnitParabolas, Tensor]:
        """The best of so many rounds, and about what they prove of the units' share."""
        row, matrix, middle = self.units.row, self.units.factor, self.units.middle
        own, u = self.own, self.own.new_zeros(len(self.own), self.units.factor.shape[1])
        for _ in range(_DESCENT):
            gradient = (own * row.slope(middle + u @ matrix.T)) @ matrix
            u = -self.units.radius * normalize(gradient, dim=1, eps=TINY)
        best = torch.full_like(self.constant, -torch.inf)
        found = UnitParabolas(torch.zeros_like(own), torch.zeros_like(own), torch.zeros_like(best))
        for number in range(rounds):
            z = (middle + u @ matrix.T).clamp(self.units.low, self.units.high)
            bend, away, tilt = self._secants(z), z - middle, own * row.slope(z)
            slope = tilt + bend * away
            touching = (own * row.value(z) - tilt * away - bend * away.square() / 2).sum(1)
            least, multiplier, lowest = _trust_region(self.units, bend, slope)
            better = touching + least > best
            best = torch.where(better, touching + least, best)
            found = _where(better, UnitParabolas(bend, slope, multiplier), found)
            u = lowest if number % 2 == 0 else (u + lowest) / 2
        return found, best

    def ascended(
        self, start: UnitParabolas, steps: int, share: float | None = None
    ) -> tuple[UnitParabolas, Tensor]:
        """Parabolas that prove more, by Adam (Kingma & Ba 2015) on bends and slopes.

        What they prove is concave in both; its supergradient is that of the points where the
        minima are attained. Those of the units are smoothed, less and less, over the grid.

        Args:
            start: where to begin.
            steps: how many.
            share: of the ball's radius, where to begin; the ball then follows the smallest root
                of what is proved. None for the ball itself.

        Returns:
            For each function those that prove most, and about what they prove; or those whose root
            is the largest, and these roots, as shares of the ball's radius.
        """
        size = self.own.abs() + TINY_NORM
        now, found = torch.stack([start.bend, start.slope]), start
        mean, square = torch.zeros_like(now), torch.zeros_like(now)
        best, moves = torch.full_like(self.constant, -torch.inf), share is not None
        share, units = share or 1.0, self.units
        for step in range(steps):
            (bend, slope), left = now, 1 - step / steps
            units = _at(self.units, share) if moves else units
            away = (units.points - units.middle)[:, None]
            over = self.own * units.row.value(units.points)[:, None]
            over = over + bend / 2 * away.square() - slope * away
            least, place = over.min(0)
            value, multiplier, u = _trust_region(units, bend, slope)
            value = self.constant + least.sum(1) + value
            if moves:
                at = torch.gather(away.expand_as(over), 0, place[None])[0]
                tilt = self.own * units.row.slope(units.middle + at) + bend * at - slope
                fall = multiplier * units.radius.square() - (tilt * at).sum(1)
                value = (share * (1 + value / fall.clamp(min=TINY))).clamp(0, 2 * share)
            better = value > best
            best = torch.where(better, value, best)
            found = _where(better, UnitParabolas(bend, slope, multiplier), found)
            if moves:
                pace = 0.5 * (float(value.min()) / share - 1)
                share = min(share * (1 + min(max(pace, -_FASTEST), _FASTEST)), 1.0)
            weight = torch.softmax((least - over) / (_SMOOTH * left * size), dim=0)
            w = u @ units.factor.mT
            rise = (weight * away.square()).sum(0) - w.square(), 2 * (w - (weight * away).sum(0))
            half = (units.high - units.low) / 2 + TINY_NORM
            scale = torch.stack([size / half.square(), size / half / 2])
            rises = torch.stack(rise) / 2 * scale
            mean, square = (
                memory * past + (1 - memory) * new
                for memory, past, new in zip(
                    _MEMORY, (mean, square), (rises, rises.square()), strict=True
                )
            )
            fresh = [1 - memory ** (step + 1) for memory in _MEMORY]
            turn = mean / fresh[0] / ((square / fresh[1]).sqrt() + 1e-3 * size)
            now = now + _RATE * (0.1 + 0.9 * left) * scale * turn
        return found, best

    def _secants(self, z: Tensor) -> Tensor:
        """Secant curvatures at ``(functions, moving)`` preactivations, as a grid sees them."""
        row, own, points = self.units.row, self.own, self.units.points
        value, slope, width = row.value(z), row.slope(z), self.units.high - self.units.low
        found = -own * row.bend(z)
        for point, height in zip(points, row.value(points), strict=True):
            away = point - z
            secant = own * (value + slope * away - height) * 2 / away.square()
            found = torch.where(away.abs() > _NEAR * width, found.maximum(secant), found)
        return found.nan_to_num(0.0, 0.0, 0.0)


def _trust_region(units: Units, bend: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """About the least value of a quadratic in the ball, its multiplier, and where it is.

    From below, where one eigenvector alone would fill the ball, Newton's method for the length of y
    (Moré & Sorensen 1983) rises to the multiplier.
    """
    radius, factor = units.radius, units.factor
    values, vectors = eigenpairs_estimate((factor.mT * bend[:, None]) @ factor)
    parts = ((slope @ factor)[:, None] @ vectors)[:, 0]
    slack = _ABOVE * values.abs().amax(1)
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
