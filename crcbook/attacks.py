"""l2 attacks: the upper bounds that keep certificates honest.

Each attack takes every other class as its target and reports what it found, never what it did not:
a failed attack proves nothing. Steps are made in float32 where that will do, and judged in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from crcbook.acceleration import Acceleration
from crcbook.checks import as_box, as_classes, as_inputs, as_radius, readable
from crcbook.networks import MarginAlong, Network, read_network
from crcbook.proof.box import Box, clip
from crcbook.steps import step_to_boundary, step_to_sphere

_CHUNK_VALUES = 2**22
_BISECTIONS = 300
_CLOSE = 1e-9  # of the distance
# Steps of a descent, in radii: one this short ends it, the second where the sign is not decided.
_SHORT, _TINY = 1e-2, 1e-4
_DECIDED = 1e-2  # of the descent so far: what is farther from 0 will not cross it
_FULL_EACH = 8  # of so many steps, one is not accelerated
_REACHES = (1 + 1e-5, 1.001, 1.03, 1.3, 4.0)  # how far beyond a point to look, in its distance


@dataclass(frozen=True)
class Attack:
    """What an attack found.

    Attributes:
        point: ``(batch, n)`` float64, the worst (or closest adversarial) point found; NaN where
            a search for the closest one found none.
        margin: ``(batch,)`` float64, the label's smallest margin over the other classes there.
        success: ``(batch,)`` bool: the margin is not positive.
        distance: ``(batch,)`` float64 l2 distance of the point; infinity where there is none.
    """

    point: Tensor
    margin: Tensor
    success: Tensor
    distance: Tensor


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | None = None,
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
    distance.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        radius: the l2 radius of the ball; None to look for the smallest distance.
        box: the lowest and the highest valid value of an input, numbers or tensors of an input's
            shape: every point stays inside. None for no box.
        steps: the number of gradients for each class and start.
        restarts: how many searches for each class; the first starts at the input, the others at
            random points.
        seed: the seed of the random starts.
        progress: show a progress bar.

    Returns:
        The points found. A misclassified input is its own adversarial point, at distance 0.

    Raises:
        TypeError: for a model or tensors of the wrong kind.
        ValueError: for a layer crcbook does not know, a wrong shape or range, NaN or infinity.
    """
    network = read_network(model, readable(x))
    x = as_inputs(x, network)
    y = as_classes("y", y, network, batch=len(x))
    radius = None if radius is None else as_radius(radius)
    box = as_box(box, x)
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1; got {steps} and {restarts}")
    generator = torch.Generator().manual_seed(seed)
    size = max(1, _CHUNK_VALUES // (network.classes * _width(network)))
    chunks = tqdm(
        zip(x.split(size), y.split(size), strict=True),
        desc="attack",
        total=-(-len(x) // size),
        disable=not progress,
        unit="chunk",
    )
    points = [
        _attack(network, part, labels, radius, box, steps, _starts(part, restarts, generator))
        for part, labels in chunks
    ]
    point = torch.cat(points)
    margin = smallest_margin(network, point, y)
    distance = (point - x).norm(dim=1).nan_to_num(nan=torch.inf)
    return Attack(point, margin, margin <= 0, distance)


def smallest_margin(network: Network, x: Tensor, y: Tensor) -> Tensor:
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


def boundary_points(
    network: Network,
    x: Tensor,
    label: Tensor,
    target: Tensor,
    start: Tensor | None = None,
    steps: int = 30,
    box: Box | None = None,
    rough: Network | None = None,
) -> Tensor:
    r"""Points where a target overtakes the label, as close to the inputs as the search gets.

    Each step goes towards the nearest point of the boundary of the margin linearised at c, in the
    box, which without one is :math:`x_0 - \nabla f \, (f + \nabla f \cdot (x_0 - c))/\|\nabla
    f\|^2`; :mod:`crcbook.acceleration` saves most of the steps. The best direction is followed to
    the boundary by root finding.

    Args:
        network: a float64 network.
        x: ``(pairs, n)`` inputs.
        label: ``(pairs,)`` their classes.
        target: ``(pairs,)`` the classes to reach.
        start: ``(pairs, n)`` first points; the inputs where None.
        steps: the number of gradients.
        box: where the points must stay; None for everywhere.
        rough: the network in another precision, for the steps; None for the same one.

    Returns:
        ``(pairs, n)`` points with a margin of at most 0; NaN where none was found.
    """
    crossing = crossings(network, x, label, target, start, steps, box, rough)
    # Interpolation rounds otherwise than evaluation does: keep the nearest point truly outside.
    reaches = (1 + 1e-11, 1 + _CLOSE, *_REACHES)
    return _first_outside(network, x, crossing, label, target, box, reaches)


def crossings(
    network: Network,
    x: Tensor,
    label: Tensor,
    target: Tensor,
    start: Tensor | None = None,
    steps: int = 30,
    box: Box | None = None,
    rough: Network | None = None,
    begin: Tensor | None = None,
) -> Tensor:
    """Where the search of :func:`boundary_points` meets the boundary, a rounding error aside.

    Args:
        network: a float64 network.
        x: ``(pairs, n)`` inputs.
        label: ``(pairs,)`` their classes.
        target: ``(pairs,)`` the classes to reach.
        start: ``(pairs, n)`` first points; the inputs where None.
        steps: the number of gradients.
        box: where the points must stay; None for everywhere.
        rough: the network in another precision, for the steps; None for the same one.
        begin: ``(pairs, width)`` the first layer's preactivations at the inputs, if they are known.

    Returns:
        ``(pairs, n)`` points whose margins may be of either sign; NaN where nothing was found.
    """
    point = _steps(rough or network, x, label, target, x if start is None else start, steps, box)
    point = clip(box, point)  # a step in another precision may end a rounding error outside
    ray = MarginAlong.of(network, (x, point), label, target, begin)
    below = ray(torch.ones_like(x[:, 0]))
    missed = (~(below <= 0)).nonzero().squeeze(1)
    if len(missed):
        few = x[missed], point[missed], label[missed], target[missed]
        point[missed] = _first_outside(network, *few, box, _REACHES)
        ray = MarginAlong.of(network, (x, point), label, target, begin)
        below[missed] = ray.take(missed)(torch.ones_like(below[missed]))
    return x + _retreat(ray, below)[:, None] * (point - x)


def _steps(
    network: Network,
    x: Tensor,
    label: Tensor,
    target: Tensor,
    point: Tensor,
    steps: int,
    box: Box | None,
) -> Tensor:
    """The nearest adversarial points of some steps, or where they ended."""
    exact, dtype = x.dtype, network.dtype
    allowed = None if box is None else box.around(x).to(dtype)
    x, point = x.to(dtype), point.to(dtype)
    best = torch.full_like(x, torch.nan)
    shortest = torch.full_like(x[:, 0], torch.inf)
    acceleration = Acceleration()
    for turn in range(steps):
        margin, gradient = network.margin_and_gradient(point, label, target)
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


def _first_outside(
    network: Network,
    x: Tensor,
    point: Tensor,
    label: Tensor,
    target: Tensor,
    box: Box | None,
    reaches: Sequence[float],
) -> Tensor:
    """The adversarial points at the shortest of some multiples of the way; NaN without any."""
    outside = torch.full_like(x, torch.nan)
    todo = torch.arange(len(x), device=x.device)
    for reach in reaches:
        end = clip(box, x[todo] + reach * (point[todo] - x[todo]))
        adversarial = _margin(network, end, label[todo], target[todo]) <= 0
        outside[todo[adversarial]] = end[adversarial]
        todo = todo[~adversarial]
        if not len(todo):
            break
    return outside


def _retreat(margin_at: MarginAlong, below: Tensor) -> Tensor:
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


def _margin(network: Network, x: Tensor, label: Tensor, target: Tensor) -> Tensor:
    logits = network.logits(x)
    return (logits.gather(1, label[:, None]) - logits.gather(1, target[:, None])).squeeze(1)


def _attack(
    network: Network,
    x: Tensor,
    y: Tensor,
    radius: float | None,
    box: Box | None,
    steps: int,
    starts: list[Tensor],
) -> Tensor:
    """The worst point of each input over all classes and starts."""
    image = torch.arange(len(x), device=x.device).repeat_interleave(network.classes - 1)
    classes = torch.arange(network.classes, device=x.device).expand(len(x), -1)
    target = classes[classes != y[:, None]]
    clean = smallest_margin(network, x, y)
    rough = network.rough
    best, score = x, clean
    if radius is None:
        best, score = torch.full_like(x, torch.nan), torch.full_like(clean, torch.inf)
    for start in starts:
        begin = clip(box, x[image] + start[image] * (1.0 if radius is None else radius))
        if radius is None:
            point = boundary_points(network, x[image], y[image], target, begin, steps, box, rough)
            value = (point - x[image]).norm(dim=1).nan_to_num(nan=torch.inf)
        else:
            point, value = descend(
                network, x[image], y[image], target, radius, begin, steps, box, rough
            )
        value, column = value.reshape(len(x), -1).min(dim=1)
        rows = torch.arange(len(x), device=x.device)
        chosen = point.reshape(len(x), -1, x.shape[1])[rows, column]
        better = value < score
        best = torch.where(better[:, None], chosen, best)
        score = torch.where(better, value, score)
    return torch.where((clean <= 0)[:, None], x, best)


def descend(
    network: Network,
    x: Tensor,
    label: Tensor,
    target: Tensor,
    radius: float | Tensor,
    start: Tensor,
    steps: int = 20,
    box: Box | None = None,
    rough: Network | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimise margins over l2 balls, in a box.

    Args:
        network: a float64 network.
        x: ``(pairs, n)`` the balls' centres.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
        radius: the balls' radius, a number or ``(pairs,)`` of them.
        start: ``(pairs, n)`` points to start from.
        steps: the number of gradients.
        box: where the points must stay; None for everywhere.
        rough: the network in another precision, for the steps; None for the same one.

    Returns:
        ``(pairs, n)`` points of the balls and ``(pairs,)`` margins there.
    """
    rough = rough or network
    dtype, radius = rough.dtype, torch.as_tensor(radius, dtype=x.dtype, device=x.device)
    allowed = None if box is None else box.around(x).to(dtype)
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
        decided = least.abs() > _DECIDED * (first[rows] - least)
        moving = move.norm(dim=1) > torch.where(decided, _SHORT, _TINY) * size
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
    point = into_ball(x, clip(box, x + best.to(x.dtype)), radius)
    return point, _margin(network, point, label, target)


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


def _width(network: Network) -> int:
    return max(max(layer.weight.shape) for layer in network.layers)
