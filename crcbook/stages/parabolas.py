"""Parabolas below the first layer's units, lines around those above."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from crcbook.proof.lines import Kind, Search, crown_margin, crown_radius
from crcbook.proof.parabolas import BentBalls, Guess, UnitParabolas, Units
from crcbook.proof.prover import Entries
from crcbook.stages.lines import Crown
from crcbook.stages.parabola_search import good_parabolas, largest_ball

_TOLERANCE = 1e-2  # of a radius: each trial bounds every layer anew
_LARGER, _BEGIN = 1.6, 0.75  # a ball to search in as a multiple of the radius known; where in it
_SEARCHES = 8  # in balls that grow
_SHARES = (0.998, 0.99, 0.97, 0.9)  # of a radius that parabolas are likely to prove


@dataclass(frozen=True)
class Parabolas(Crown):
    """A stage of quadratic relaxations, which goes on from the radii that are proved.

    With one hidden layer the functions of the units are the margins themselves, in every ball the
    same. So one ascent serves all balls, which shrink or grow while the parabolas get better. With
    more layers, each ball has lines of its own and is asked for its margins.

    Attributes:
        prover: the network, prepared for proofs.
        box: whether the adversary is confined to the table's box; the parabolas know of none.
    """

    method: str = "parabolas"

    @property
    def _kind(self) -> Kind:
        return partial(BentBalls.of, guess=good_parabolas)

    def _radii(self, entries: Entries, limit: Tensor) -> Tensor:
        if len(self.prover.network.layers) == 2:
            return self._in_one_ascent(entries, limit)
        search = Search(self._kind, True, _TOLERANCE, entries.bound)
        return crown_radius(self.prover, entries.x, entries.label, entries.target, limit, search)

    def _in_one_ascent(self, entries: Entries, limit: Tensor) -> Tensor:
        """``(entries,)`` radii, the same for all entries of an image that are raised."""
        found, rows = entries.bound.clone(), (entries.bound <= 0).nonzero().squeeze(1)
        if len(rows):  # nothing to go on from but lines
            found[rows] = super()._radii(entries.take(rows), limit[rows])
        for image in entries.image.unique():
            rows = (entries.image == image).nonzero().squeeze(1)
            known, enough = found[rows].min(), limit[rows].min()
            if 0 < known < enough:
                raised = self._of_one_image(entries.take(rows), float(known), float(enough))
                found[rows] = found[rows].clamp(min=raised)
        return found

    def _of_one_image(self, entries: Entries, known: float, enough: float) -> float:
        """A radius at which every margin is proved, if one is found beyond the one known."""
        for _ in range(_SEARCHES):
            search, outer = _OneAscent(), _LARGER * known
            if not self._proved(entries, outer, search.begin):
                radii = (share * search.share * outer for share in _SHARES)
                larger = (radius for radius in radii if radius > known)
                return next((r for r in larger if self._proved(entries, r, search.recall)), known)
            known = outer
            if known >= enough:
                break
        return known

    def _proved(self, entries: Entries, radius: float, guess: Guess) -> bool:
        """Whether all margins are proved positive in a ball."""
        margins = self.prover, entries.x, entries.label, entries.target
        kind = partial(BentBalls.of, guess=guess)
        return bool((crown_margin(*margins, radius, kind) > 0).all())


class _OneAscent:
    """One ascent over balls, and the parabolas that it ended with.

    Attributes:
        share: of the ball that it began in, the one in which all functions are likely to be proved.
        kept: by the function's position, bends and slopes of all units, and a multiplier.
    """

    def __init__(self) -> None:
        self.share = 1.0
        self.kept: dict[int, UnitParabolas] = {}

    def begin(
        self, units: Units, constant: Tensor, own: Tensor, functions: Tensor, goal: float
    ) -> UnitParabolas:
        """Search; a ``Guess`` for the largest ball."""
        found, share = largest_ball(units, constant, own, _BEGIN)
        self.share = min(self.share, share)
        whole = own.new_zeros(2, len(own), len(units.ends[0]))
        whole[:, :, units.moving] = torch.stack([found.bend, found.slope])
        for i, function in enumerate(functions.tolist()):
            self.kept[function] = UnitParabolas(whole[0, i], whole[1, i], found.multiplier[i])
        return found

    def recall(
        self, units: Units, constant: Tensor, own: Tensor, functions: Tensor, goal: float
    ) -> UnitParabolas:
        """What was found; a ``Guess`` for the balls inside."""
        if not self.kept.keys() >= set(functions.tolist()):
            # A line proved one of them in a larger ball, and does not in this one.
            return good_parabolas(units, constant, own, functions, goal)
        kept = (vars(self.kept[function]).values() for function in functions.tolist())
        bend, slope, multiplier = (torch.stack(column) for column in zip(*kept, strict=True))
        return UnitParabolas(bend[:, units.moving], slope[:, units.moving], multiplier)
