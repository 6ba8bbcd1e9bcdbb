"""Where to try next, in a search for the largest radius that a proof reaches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.proof.arithmetic import OUTWARD

_STEPS = 60
# Trials as multiples of the largest radius proved, and of the smallest one that is not.
_SHRINK, _SHORTEST, _LONGEST = 0.3, 1.5, 8.0
# Where a radius is known already, the first trial as a multiple of it, and what the margin may be
# there as a share of the clean one; both are guesses.
_BEYOND, _LEFT = 1.3, 0.3


@dataclass
class Bracket:
    """Radii proved and not proved, ``(searches,)`` each, with heights there; where to try next.

    A height is a margin, but for negative ones, which fall off steeply: of those the logarithm.
    """

    clean: Tensor  # the margin at radius 0
    slope: Tensor  # how fast it falls there
    limit: Tensor  # a radius that is good enough
    low: Tensor
    low_height: Tensor
    high: Tensor
    high_height: Tensor
    old: Tensor  # the end that the last trial replaced
    old_height: Tensor
    trial: Tensor
    steps: Tensor  # left
    settled: Tensor
    tolerance: float

    @classmethod
    def start(
        cls,
        clean: Tensor,
        slope: Tensor,
        limit: Tensor,
        known: Tensor,
        first: Tensor,
        tolerance: float,
    ) -> "Bracket":
        """Searches of which nothing is known but the input, and radii proved otherwise."""
        first = torch.where(known > 0, known * _BEYOND, first)
        trial = torch.where(limit.isfinite(), limit * OUTWARD, first)
        trial = torch.where((trial > 0) & trial.isfinite(), trial, 1.0)
        low, high = known.clone(), torch.full_like(clean, torch.inf)
        old, steps = torch.full_like(clean, torch.nan), torch.full_like(clean, _STEPS)
        settled = ~clean.isfinite()
        height = torch.where(known > 0, _LEFT * clean, clean)
        columns = clean, slope, limit, low, height, high, -high, old, old.clone()
        return cls(*columns, trial, steps, settled, tolerance)

    @property
    def unsettled(self) -> Tensor:
        """``(searches,)`` which ones are worth another trial."""
        return ~self.settled & (self.low <= self.limit) & (self.steps > 0)

    def update(self, rows: Tensor, radius: Tensor, margin: Tensor) -> None:
        """Learn from the margins of the searches ``rows`` among all of them.

        Args:
            rows: their positions.
            radius: ``(searches,)`` where they were tried; it may be another's trial.
            margin: ``(searches,)`` what was found.
        """
        fallen = -self.clean * torch.log1p(-margin.clamp(max=0) / self.clean)
        height = torch.where(margin > 0, margin, fallen.nan_to_num(nan=-torch.inf))
        tried = torch.zeros_like(self.settled).index_fill(0, rows, True)
        self.steps = self.steps - (tried & (radius == self.trial)).to(self.steps)
        tried &= (self.low < radius) & (radius < self.high)
        for chosen, end, value in [
            (tried & (margin > 0), self.low, self.low_height),
            (tried & ~(margin > 0), self.high, self.high_height),
        ]:
            self.old[chosen], self.old_height[chosen] = end[chosen], value[chosen]
            end[chosen], value[chosen] = radius[chosen], height[chosen]
        wide, root = self.high - self.low > self.tolerance * self.high, self._root()
        near = self.high.isfinite() & (root - self.low <= self.tolerance * self.low)
        self.settled |= self.high.isfinite() & (near | ~wide)
        between = (root * (1 - self.tolerance / 2)).clamp(min=self.low, max=self.high)
        stuck = (self.steps % 4 == 0) | ~((self.low < between) & (between < self.high))
        between = torch.where(stuck & (self.low > 0), (self.low + self.high) / 2, between)
        self.trial = torch.where(self.high.isinf(), self._further(), between)

    def _further(self) -> Tensor:
        """Where a parabola that touches the margin at 0 vanishes, not too far from here."""
        low, clean = self.low, self.clean
        bend = ((clean - self.slope * low - self.low_height) / low.square()).clamp(min=0)
        root = 2 * clean / (self.slope + (self.slope.square() + 4 * bend * clean).sqrt())
        return root.fmin(_LONGEST * low).fmax(_SHORTEST * low)

    def _root(self) -> Tensor:
        """Where the heights vanish: by interpolation, or nearer to 0 where only 0 is proved."""
        low, above, high, below = self.low, self.low_height, self.high, self.high_height
        linear = high + below / (below - above) * (low - high)
        old, before = self.old, self.old_height
        share = below / (above - below) * before / (above - before) + (old - high) / (
            low - high
        ) * below / (before - below) * above / (before - above)
        quadratic = high + share * (low - high)
        inside = (low < quadratic) & (quadratic < high)
        root = torch.where(inside, quadratic, torch.where(linear.isfinite(), linear, low))
        return torch.where(low > 0, root, linear.fmin(high * _SHRINK))
