"""l2 attacks: the upper bounds that keep certificates honest.

Each attack takes every other class as its target and reports what it found, never what it did not:
a failed attack proves nothing. Steps are made in float32 where that will do, and judged in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from crcbook.acceleration import Acceleration
from crcbook.checks import Items, as_box, as_count, as_labels, as_radii, as_tensor, read_items
from crcbook.networks import MarginAlong, Network, logit_margin
from crcbook.networks.reading import as_module
from crcbook.proof.box import Box, clip
from crcbook.proof.prover import Entries, Prover
from crcbook.steps import step_to_boundary, step_to_sphere
from crcbook.unread import SegmentMargins, Unread

_CHUNK_VALUES = 2**22  # of items attacked at once: 32 MB in float64
_BISECTIONS = 300  # at most, of a segment that crosses a boundary
_CLOSE = 1e-9  # of the distance
# What a descent can still gain, in what it gained so far, over the square of its step in radii;
# steps from which it is left where that does not decide the sign are between the other two.
_GAIN, _SHORTEST, _LONGEST = 100.0, 1e-4, 0.1
_FULL_EACH = 8  # of so many steps, one is not accelerated
# Balls, in the smallest distance found, in which an attack looks once more.
_SMALLER = (0.5, 0.8, 0.95)
# Balls, in the distance to the linearised boundary, in which it looks where it found nothing.
_LARGER = (1.0, 3.0, 10.0, 30.0, 100.0)
_REACHES = (1 + 1e-5, 1.001, 1.03, 1.3, 4.0)  # how far beyond a point to look, in its distance
# How much further, or less far, than a point to look for one in the precision of the inputs.
_ASIDE = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)


@dataclass(frozen=True)
class Aim:
    """Where an attack starts, and where it wants to go.

    Attributes:
        network: a float64 network, or what stands for a model that cannot be read.
        x: ``(pairs, n)`` float64 inputs.
        label: ``(pairs,)`` their classes.
        target: ``(pairs,)`` the classes to reach.
        box: where points must stay; None for everywhere.
        rough: the network in another precision, for the steps; None for the same one.
    """

    network: Network | Unread
    x: Tensor
    label: Tensor
    target: Tensor
    box: Box | None = None
    rough: Network | Unread | None = None

    @classmethod
    def of(cls, prover: Prover, entries: Entries, box: Box | None = None) -> "Aim":
        """The aim to refute some margins.

        Args:
            prover: the network.
            entries: the margins.
            box: where points must stay, a box an image of the entries' table or one for all; None
                for what the entries are allowed, a rounding error outward.

        Returns:
            The aim.
        """
        x, allowed = entries.x, entries.allowed
        if box is not None:
            box = box.take(entries.image)
        elif allowed is not None:
            box = Box(x + allowed.low, x + allowed.high)
        return cls(prover.network, x, entries.label, entries.target, box, prover.rough)

    def take(self, rows: Tensor) -> "Aim":
        """Some of the pairs.

        Args:
            rows: positions.

        Returns:
            Their aim.
        """
        box = None if self.box is None else self.box.take(rows)
        pairs = self.x[rows], self.label[rows], self.target[rows]
        return Aim(self.network, *pairs, box, self.rough)

    def margin(self, point: Tensor) -> Tensor:
        """The margins at points, in the points' precision.

        Args:
            point: ``(pairs, n)``.

        Returns:
            ``(pairs,)``.
        """
        return _margin(self.network, point, self.label, self.target)

    def along(self, point: Tensor, begin: Tensor | None = None) -> MarginAlong | SegmentMargins:
        """The margins on the segments from the inputs to points.

        Args:
            point: ``(pairs, n)``.
            begin: ``(pairs, width)`` the first layer's preactivations at the inputs, if they are
                known.

        Returns:
            A function of ``(pairs,)`` fractions of the way.
        """
        network, pairs = self.network, (self.label, self.target)
        if isinstance(network, Unread):
            return SegmentMargins(network, self.x, point - self.x, *pairs)
        return MarginAlong.of(network, (self.x, point), *pairs, begin)


@dataclass(frozen=True, repr=False)
class Attack:
    """What an attack found.

    Attributes:
        point: ``(batch, *input_shape)`` in the precision of the inputs, the worst (or closest
            adversarial) point found; NaN where a search for the closest one found none.
        margin: ``(batch,)`` float64, the label's smallest margin over the other classes there.
        success: ``(batch,)`` bool: the margin is not positive.
        distance: ``(batch,)`` float64 l2 distance of the point; infinity where there is none.
    """

    point: Tensor
    margin: Tensor
    success: Tensor
    distance: Tensor

    def __repr__(self) -> str:
        """A line: how many adversarial points, and how far they are."""
        found, count = int(self.success.sum()), len(self.success)
        text = f"Attack on {count} item{'s' * (count != 1)}: {found} adversarial"
        if wrong := int((self.success & (self.distance == 0)).sum()):
            text += f", of which {wrong} as they are"
        if found > wrong:
            moved = self.success & (self.distance > 0)
            text += f", at a mean distance of {self.distance[moved].mean():.4g}"
        return f"{text} (fields: point, margin, success, distance)"


def attack(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor | None = None,
    radius: float | Tensor | None = None,
    box: tuple | None = None,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Attack:
    r"""Attack every input towards every other class.

    With a radius, a margin is minimised over the ball: each step goes to where its linearisation
    is smallest in the ball, damped where that stops helping. Without one, steps towards the
    nearest point of the linearised boundary, and bisections back to it, look for the smallest
    distance. Where they find none, margins are minimised over growing balls; and then over
    smaller ones, for behind units that saturate a linearised boundary is far too far away.

    Margins are those of the network that is read from the model, in float64. A model that cannot
    be read, and any other differentiable function, is evaluated as it is: a module in the precision
    of its parameters, another function in that of the inputs.

    Args:
        model: a module, or any function of ``(batch, *input_shape)`` that gives ``(batch,
            classes)`` logits, an item's from the item alone; one logit counts as that of class 1,
            beside 0 of class 0.
        x: ``(batch, *input_shape)`` inputs, a tensor or a NumPy array; of a model that is read,
            also one item without a batch dimension, which is answered as a batch of 1.
        y: ``(batch,)`` integer labels or ``(batch, classes)`` one-hot rows; None for the model's
            predictions.
        radius: the l2 radius of the ball, or ``(batch,)`` of them, in the units of the input; None
            to look for the smallest distance.
        box: the lowest and the highest valid value of an input, numbers or tensors that broadcast
            to the inputs' shape: every point stays inside. None for no box.
        steps: the number of gradients for each class and start.
        restarts: how many searches for each class; the first starts at the input, the others at
            random points.
        seed: the seed of the random starts.
        progress: show a progress bar.

    Returns:
        The points found. A misclassified input is its own adversarial point, at distance 0.

    Raises:
        TypeError: for a model that cannot be called, or arguments of the wrong kind.
        ValueError: for a function that gives no logits or no gradient, a wrong shape or range, NaN
            or infinity.
    """
    network, items = _opened(model, x)
    y = as_labels(y, network, items)
    box = as_box(box, items.x, items.shape, items.dtype)
    steps, restarts = as_count("steps", steps), as_count("restarts", restarts)
    generator = torch.Generator().manual_seed(as_count("seed", seed, least=0))
    size = max(1, _CHUNK_VALUES // (network.classes * _width(network)))
    radii = None if radius is None else as_radii(radius, items)
    points = []
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc="attack", disable=not progress, unit="chunk"):
        part = slice(start, start + size)
        aim = Aim(network, items.x[part], y[part], y[part], box and box.take(part), network.rough)
        search = _Nearest(aim, steps) if radii is None else _Worst(aim, steps, radii[part])
        found = search.run(_starts(aim.x, restarts, generator))
        points.append(search.rounded(found, items.dtype))
    point = torch.cat(points)
    margin = smallest_margin(network, point, y)
    distance = (point - items.x).norm(dim=1).nan_to_num(nan=torch.inf)
    return Attack(items.like(point), margin, margin <= 0, distance)


def _opened(model: Any, x: Any) -> tuple[Network | Unread, Items]:
    """The network that is read from a model or, where it cannot be read, the model."""
    x, model, refused = as_tensor(x), as_module(model), None
    if not callable(model):
        raise TypeError(f"model must be a module or a function; got {type(model).__name__}")
    if isinstance(model, nn.Module):
        try:
            return read_items(model, x)
        except ValueError as error:
            refused = error
    try:
        network = Unread.of(model, x)
    except ValueError as error:
        raise (refused or error) from error
    flat = x.flatten(1).to(network.device, torch.float64)
    return network, Items(flat, x.shape, x.dtype)


def smallest_margin(network: Network | Unread, x: Tensor, y: Tensor) -> Tensor:
    """The label's logit less the largest other one.

    Args:
        network: the network.
        x: ``(batch, n)``.
        y: ``(batch,)`` labels.

    Returns:
        ``(batch,)``; negative where another class wins.
    """
    logits = network.logits(x)
    own = logits.gather(1, y[:, None]).squeeze(1)
    return own - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def first_in_precision(
    x: Tensor,
    point: Tensor,
    box: Box | None,
    inward: bool,
    good: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The first points a little further away, or less far, that are still good once rounded.

    Args:
        x: ``(batch, n)`` float64, from where.
        point: ``(batch, n)`` float64 points; NaN where there is none.
        box: where they must stay; None for everywhere.
        inward: whether to look at points that are less far.
        good: of ``(rows,)`` positions and points, which will do.
        dtype: the precision to round to; in that of the points they stay as they are.

    Returns:
        ``(batch, n)`` points of that precision, in that of ``point``; NaN where none will do.
    """
    if dtype == point.dtype:
        return point
    rounded = torch.full_like(point, torch.nan)
    rows = point.isfinite().all(1).nonzero().squeeze(1)
    for share in _ASIDE:
        if not len(rows):
            break
        reach = 1 - share if inward else 1 + share
        moved = x[rows] + reach * (point[rows] - x[rows])
        candidate = clip(box and box.take(rows), moved).to(dtype).to(point.dtype)
        fine = good(rows, candidate)
        rounded[rows[fine]] = candidate[fine]
        rows = rows[~fine]
    return rounded


def boundary_points(aim: Aim, start: Tensor | None = None, steps: int = 30) -> Tensor:
    r"""Points where a target overtakes the label, as close to the inputs as the search gets.

    Each step goes towards the nearest point of the boundary of the margin linearised at c, in the
    box, which without one is :math:`x_0 - \nabla f \, (f + \nabla f \cdot (x_0 - c))/\|\nabla
    f\|^2`; :mod:`crcbook.acceleration` saves most of the steps. The best direction is followed to
    the boundary by root finding.

    Args:
        aim: where to start, and where to go.
        start: ``(pairs, n)`` first points; the inputs where None.
        steps: the number of gradients.

    Returns:
        ``(pairs, n)`` points with a margin of at most 0; NaN where none was found.
    """
    crossing = crossings(aim, start, steps)
    # Interpolation rounds otherwise than evaluation does: keep the nearest point truly outside.
    return _first_outside(aim, crossing, (1 + 1e-11, 1 + _CLOSE, *_REACHES))


def crossings(
    aim: Aim, start: Tensor | None = None, steps: int = 30, begin: Tensor | None = None
) -> Tensor:
    """Where the search of :func:`boundary_points` meets the boundary, a rounding error aside.

    Args:
        aim: where to start, and where to go.
        start: ``(pairs, n)`` first points; the inputs where None.
        steps: the number of gradients.
        begin: ``(pairs, width)`` the first layer's preactivations at the inputs, if they are known.

    Returns:
        ``(pairs, n)`` points whose margins may be of either sign; NaN where nothing was found.
    """
    x = aim.x
    point = steps_to_boundary(aim, x if start is None else start, steps)
    point = clip(aim.box, point)  # a step in another precision may end a rounding error outside
    ray = aim.along(point, begin)
    below = ray(torch.ones_like(x[:, 0]))
    missed = (~(below <= 0)).nonzero().squeeze(1)
    if len(missed):
        few = aim.take(missed)
        point[missed] = _first_outside(few, point[missed], _REACHES)
        other = few.along(point[missed], None if begin is None else begin[missed])
        ray.way[missed], below[missed] = other.way, other(torch.ones_like(below[missed]))
    return x + _retreat(ray, below)[:, None] * (point - x)


def steps_to_boundary(aim: Aim, point: Tensor, steps: int) -> Tensor:
    """The steps of :func:`boundary_points`, in the precision of the aim's rough network.

    Args:
        aim: where to start, and where to go.
        point: ``(pairs, n)`` first points.
        steps: the number of gradients.

    Returns:
        ``(pairs, n)`` the nearest of the points with a negative margin that were met; where none
        was, the last point.
    """
    network, exact = aim.rough or aim.network, aim.x.dtype
    allowed = None if aim.box is None else aim.box.around(aim.x).to(network.dtype)
    x, point = aim.x.to(network.dtype), point.to(network.dtype)
    best = torch.full_like(x, torch.nan)
    shortest = torch.full_like(x[:, 0], torch.inf)
    acceleration = Acceleration()
    for turn in range(steps):
        margin, gradient = network.margin_and_gradient(point, aim.label, aim.target)
        distance = (point - x).norm(dim=1)
        hit = (margin <= 0) & (distance < shortest)
        best[hit], shortest[hit] = point[hit], distance[hit]
        eta = step_to_boundary(margin + (gradient * (x - point)).sum(1), gradient, allowed)
        step = -eta[:, None] * gradient
        move = _finite(x + (step if allowed is None else allowed.clip(step)) - point)
        step = _finite(acceleration.step(point, move))
        # Where margins are all cliffs, accelerated steps can settle far from any boundary.
        point = point + (move if turn % _FULL_EACH == _FULL_EACH - 1 else step)
        point = point if allowed is None else x + allowed.clip(point - x)
    return torch.where(shortest.isinf()[:, None], point, best).to(exact)


def _finite(way: Tensor) -> Tensor:
    """No way at all where one has no length that is finite, as where a gradient vanishes."""
    return torch.where(way.norm(dim=1, keepdim=True).isfinite(), way, 0.0)


def _first_outside(aim: Aim, point: Tensor, reaches: Sequence[float]) -> Tensor:
    """The adversarial points at the shortest of some multiples of the way; NaN without any."""
    outside = torch.full_like(aim.x, torch.nan)
    todo = torch.arange(len(outside), device=outside.device)
    for reach in reaches:
        few = aim.take(todo)
        end = clip(few.box, few.x + reach * (point[todo] - few.x))
        adversarial = few.margin(end) <= 0
        outside[todo[adversarial]] = end[adversarial]
        todo = todo[~adversarial]
        if not len(todo):
            break
    return outside


def _retreat(margin_at: MarginAlong | SegmentMargins, below: Tensor) -> Tensor:
    """The fractions where segments enter, up to adversarial ones: regula falsi, with halvings.

    ``below`` are the margins at the outer ends.
    """
    rows = torch.arange(len(below), device=below.device)
    inner, outer, entered = torch.zeros_like(below), torch.ones_like(below), torch.ones_like(below)
    above = margin_at(inner)
    was_beyond = torch.ones_like(rows, dtype=torch.bool)
    for step in range(_BISECTIONS):
        middle = (inner * below - outer * above) / (below - above)
        if step % 4 == 3:
            middle = (inner + outer) / 2
        # No step is shorter than what is asked for: the other end comes over at once.
        least = 0.4 * _CLOSE * outer
        middle = middle.maximum(inner + least).minimum(outer - least)
        margin = margin_at(middle)
        beyond = margin <= 0
        # The Illinois rule: an end that stays put twice counts half, so that both ends move.
        stays = torch.where(beyond == was_beyond, 0.5, 1.0)
        above = torch.where(beyond, above * stays, margin)
        below = torch.where(beyond, margin, below * stays)
        was_beyond = beyond
        inner, outer = torch.where(beyond, inner, middle), torch.where(beyond, middle, outer)
        entered[rows] = outer
        wide = outer - inner > _CLOSE * outer
        if not wide.any():
            break
        if wide.sum() < len(wide) / 2:  # go on with those alone
            wide = wide.nonzero().squeeze(1)
            rows, inner, outer = rows[wide], inner[wide], outer[wide]
            above, below, margin_at = above[wide], below[wide], margin_at.take(wide)
            was_beyond = was_beyond[wide]
    return entered


def _margin(network: Network | Unread, x: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return logit_margin(network.logits(x), label, target)


@dataclass(frozen=True)
class _Search:
    """An attack on some inputs towards every other class, whatever its aim's target."""

    aim: Aim
    steps: int

    @cached_property
    def image(self) -> Tensor:
        """``(pairs,)`` the inputs' positions, one for each other class."""
        x = self.aim.x
        return torch.arange(len(x), device=x.device).repeat_interleave(self.aim.network.classes - 1)

    @cached_property
    def every(self) -> Aim:
        """The aim at every other class of every input."""
        y, count = self.aim.label, self.aim.network.classes
        classes = torch.arange(count, device=y.device).expand(len(y), -1)
        return replace(self.aim.take(self.image), target=classes[classes != y[:, None]])

    @cached_property
    def clean(self) -> Tensor:
        """``(batch,)`` the smallest margins at the inputs."""
        return smallest_margin(self.aim.network, self.aim.x, self.aim.label)

    def unless_wrong(self, point: Tensor) -> Tensor:
        """The points found; the input itself where it is misclassified."""
        return torch.where((self.clean <= 0)[:, None], self.aim.x, point)


@dataclass(frozen=True)
class _Worst(_Search):
    """The smallest margins in balls of given radii."""

    radius: Tensor

    def run(self, starts: list[Tensor]) -> Tensor:
        """The worst point of each input over all classes and starts."""
        every, image = self.every, self.image
        best, score = self.aim.x, self.clean
        for start in starts:
            begin = clip(every.box, every.x + (self.radius[:, None] * start)[image])
            found = descend(every, self.radius[image], begin, self.steps)
            best, score = _better(best, score, *found)
        return self.unless_wrong(best)

    def rounded(self, point: Tensor, dtype: torch.dtype) -> Tensor:
        """The points in the inputs' precision, still in their balls."""
        if dtype == point.dtype:
            return point
        x = self.aim.x

        def good(rows: Tensor, candidate: Tensor) -> Tensor:
            return (candidate - x[rows]).norm(dim=1) <= self.radius[rows]

        inside = first_in_precision(x, point, self.aim.box, True, good, dtype)
        # In a ball smaller than the roundings of its points there is the input alone.
        return torch.where(inside.isnan().any(1, keepdim=True), x, inside)


@dataclass(frozen=True)
class _Nearest(_Search):
    """The smallest distances of adversarial points."""

    def run(self, starts: list[Tensor]) -> Tensor:
        """The nearest adversarial point of each input over all classes and starts; NaN without."""
        every, image = self.every, self.image
        best, score = torch.full_like(self.aim.x, torch.nan), torch.full_like(self.clean, torch.inf)
        for start in starts:
            point = boundary_points(every, clip(every.box, every.x + start[image]), self.steps)
            best, score = _better(best, score, point, _distances(every, point))
        for factor in _LARGER:
            missing = score.isinf() & (self.clean > 0)
            if not missing.any():
                break
            point = self._in_balls((factor * self._ahead).masked_fill(~missing, torch.inf))
            best, score = _better(best, score, point, _distances(every, point))
        for share in _SMALLER:
            point = self._in_balls(share * score)
            best, score = _better(best, score, point, _distances(every, point))
        return self.unless_wrong(best)

    @cached_property
    def _ahead(self) -> Tensor:
        """``(batch,)`` how far the nearest boundary would be if margins were linear."""
        every = self.every
        margin, gradient = every.network.margin_and_gradient(every.x, every.label, every.target)
        return (margin / gradient.norm(dim=1)).reshape(len(self.clean), -1).amin(1)

    def _in_balls(self, radius: Tensor) -> Tensor:
        """From worst points in balls to the boundary; NaN where these are not adversarial."""
        known = (radius.isfinite() & (self.clean > 0))[self.image].nonzero().squeeze(1)
        few, found = self.every.take(known), torch.full_like(self.every.x, torch.nan)
        point, margin = descend(few, radius[self.image[known]], few.x, self.steps)
        hit = (margin <= 0).nonzero().squeeze(1)
        found[known[hit]] = boundary_points(few.take(hit), point[hit], self.steps)
        return found

    def rounded(self, point: Tensor, dtype: torch.dtype) -> Tensor:
        """The points in the inputs' precision, still adversarial."""
        network, y = self.aim.network, self.aim.label

        def good(rows: Tensor, candidate: Tensor) -> Tensor:
            return smallest_margin(network, candidate, y[rows]) <= 0

        return first_in_precision(self.aim.x, point, self.aim.box, False, good, dtype)


def _distances(aim: Aim, point: Tensor) -> Tensor:
    """How far points are; infinity for NaN."""
    return (point - aim.x).norm(dim=1).nan_to_num(nan=torch.inf)


def _better(best: Tensor, score: Tensor, point: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The best points of some items, and their scores, with those of every class beside them."""
    value, column = value.reshape(len(best), -1).min(dim=1)
    rows = torch.arange(len(best), device=best.device)
    chosen = point.reshape(len(best), -1, best.shape[1])[rows, column]
    better = value < score
    return torch.where(better[:, None], chosen, best), torch.where(better, value, score)


def descend(
    aim: Aim, radius: float | Tensor, start: Tensor, steps: int = 20, decide: bool = False
) -> tuple[Tensor, Tensor]:
    """Minimise margins over l2 balls, in a box.

    Args:
        aim: the balls' centres, and the margins.
        radius: the balls' radius, a number or ``(pairs,)`` of them.
        start: ``(pairs, n)`` points to start from.
        steps: the number of gradients.
        decide: stop at a negative margin: how low it gets is of no interest.

    Returns:
        ``(pairs, n)`` points of the balls and ``(pairs,)`` margins there.
    """
    rough, x, label, target = aim.rough or aim.network, aim.x, aim.label, aim.target
    dtype, radius = rough.dtype, torch.as_tensor(radius, dtype=x.dtype, device=x.device)
    allowed = None if aim.box is None else aim.box.around(x).to(dtype)
    centre, delta = x.to(dtype), (start - x).to(dtype)
    best, lowest = torch.zeros_like(delta), torch.full_like(delta[:, 0], torch.inf)
    first, rows = lowest.clone(), torch.arange(len(lowest), device=x.device)
    size, damping = radius.to(dtype).expand(len(x)), torch.ones_like(lowest)
    pairs, ends = (label, target), delta.clone()
    for _ in range(steps):
        margin, gradient = rough.margin_and_gradient(centre + delta, *pairs)
        improved = margin < lowest[rows]
        best[rows[improved]], lowest[rows[improved]] = delta[improved], margin[improved]
        first[rows] = torch.where(first[rows].isinf(), margin, first[rows])
        damping = torch.where(improved, damping, damping / 2)
        # Where the gradient vanishes a step would be infinite.
        eta = step_to_sphere(gradient, size, allowed).clamp(max=torch.finfo(dtype).max ** 0.5)
        goal = -eta[:, None] * gradient
        goal = goal if allowed is None else allowed.clip(goal)
        move = goal - delta
        delta = delta + damping[:, None] * move
        delta = delta * (size / delta.norm(dim=1)).clamp(max=1)[:, None]
        # What further steps gain is of the order of the square of a step.
        least = lowest[rows]
        needed = (least.abs() / (first[rows] - least) / _GAIN).sqrt()
        moving = move.norm(dim=1) > needed.clamp(_SHORTEST, _LONGEST) * size
        moving &= ~(decide & (least < 0))
        ends[rows] = delta
        if not moving.all():
            keep = moving.nonzero().squeeze(1)
            if not len(keep):
                break
            rows, centre, delta = rows[keep], centre[keep], delta[keep]
            size, damping = size[keep], damping[keep]
            pairs = pairs[0][keep], pairs[1][keep]
            allowed = None if allowed is None else allowed.take(keep)
    last = _margin(rough, x.to(dtype) + ends, label, target)
    best = torch.where((last < lowest)[:, None], ends, best)
    point = into_ball(x, clip(aim.box, x + best.to(x.dtype)), radius)
    return point, aim.margin(point)


def into_ball(x: Tensor, point: Tensor, radius: float | Tensor) -> Tensor:
    """Move points towards the centres until they lie in l2 balls, a rounding error inside.

    Args:
        x: ``(batch, n)`` the balls' centres.
        point: ``(batch, n)``.
        radius: the balls' radius, or ``(batch,)`` radii.

    Returns:
        ``(batch, n)``.
    """
    away = point - x
    scale = radius * (1 - 1e-14) / away.norm(dim=1)
    return torch.where((scale < 1)[:, None], x + away * scale[:, None], point)


def _starts(x: Tensor, restarts: int, generator: torch.Generator) -> list[Tensor]:
    """Displacements to start from: none, then random ones of at most unit length."""
    starts = [torch.zeros_like(x)]
    drawn: dict[str, Any] = {"generator": generator, "dtype": x.dtype, "device": "cpu"}
    for _ in range(restarts - 1):
        noise = torch.randn(x.shape, **drawn).to(x)
        length = torch.rand(len(x), 1, **drawn).to(x)
        starts.append(torch.nn.functional.normalize(noise, dim=1) * length)
    return starts


def _width(network: Network | Unread) -> int:
    if isinstance(network, Unread):
        return network.inputs
    return max(max(layer.weight.shape) for layer in network.layers)
