r"""The search for the best minorant: a fixed-point iteration, accelerated.

Nothing rests on whether it converged: a point that it returns is proved at, by
:mod:`crcbook.proof.quadratic`, like any other.
"""

import torch
from torch import Tensor

from crcbook.acceleration import Acceleration
from crcbook.networks import Network
from crcbook.proof.box import step_to_boundary, step_to_sphere
from crcbook.proof.quadratic import Minorant, Pairs

SEARCH_STEPS, POLISH_STEPS = 100, 3  # at most; in single precision, then in double precision
_GAIN, _PATIENCE = 1e-5, 10  # a smaller relative gain counts as none; steps without one
_ROUGH_GAIN, _ROUGH_PATIENCE = 3e-3, 2  # where another search goes on
_SETTLED = 1e-5  # of the distance; what is left to gain is of the order of its square


def search(
    network: Network,
    pairs: Pairs,
    start: Tensor,
    steps: int,
    limit: Tensor,
    radius: float | None = None,
    rough: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Look for the points c of the best minorants.

    The best c is the fixed point of :math:`c \mapsto x_0 - \eta \nabla f(c)`. :math:`\eta` is the
    dual variable: for a radius it makes the linearised margin vanish, for a ball it puts the point
    on the sphere; never more than 1/k, where the dual ends. Repeating the map would cycle where a
    margin is strongly curved; :mod:`crcbook.acceleration` makes it converge.

    Args:
        network: the network, in the precision of the search.
        pairs: the margins.
        start: ``(pairs, n)`` points to start from.
        steps: at most so many gradients a pair.
        limit: ``(pairs,)`` bounds that are good enough.
        radius: of the ball to bound the margin in; None to enlarge the certified radius.
        rough: stop early: another search goes on.

    Returns:
        ``(pairs, n)`` float64 points, finite, and ``(pairs,)`` guesses of the bounds there.
    """
    dtype = network.dtype
    least, patience = (_ROUGH_GAIN, _ROUGH_PATIENCE) if rough else (_GAIN, _PATIENCE)
    pairs, point = pairs.to(dtype), start.to(dtype)
    best, points = torch.full_like(pairs.curvature, -torch.inf), point.clone()
    enough = limit + 4 * torch.finfo(dtype).eps * (1 + limit.abs())
    active = torch.arange(len(best), device=best.device)
    stalled, acceleration = torch.zeros_like(active), Acceleration()
    for _ in range(steps if len(active) else 0):
        margin, gradient = network.margin_and_gradient(
            point, pairs.label, pairs.target, pairs.shift
        )
        bound = _bound(pairs, point, margin, gradient, radius)
        gain = bound - best[active]
        better = (gain > 0).nonzero().squeeze(1)
        best[active[better]] = bound[better]
        points.index_copy_(0, active[better], point.index_select(0, better))
        stalled = torch.where(gain > least * bound.abs(), 0, stalled + 1)
        move = fixed_point(pairs, point, margin, gradient, radius) - point
        point = point + acceleration.step(point, move)
        left = move.norm(dim=1)
        keep = left.isfinite() & ~(left <= _SETTLED * (pairs.x0 - point).norm(dim=1))
        keep &= (stalled < patience) & ~(best[active] > enough[active])
        if radius is not None:
            keep &= ~(margin < 0)  # an adversary in the ball: there is nothing to prove
        if not keep.all():
            index = keep.nonzero().squeeze(1)
            if not len(index):
                break
            active, stalled, point = active[index], stalled[index], point.index_select(0, index)
            pairs, acceleration = pairs.take(index), acceleration.take(index)
    return torch.where(points.isfinite(), points.double(), start.double()), best.double()


def _bound(pairs: Pairs, point: Tensor, margin, gradient, radius: float | None) -> Tensor:
    """The minorants' radius or margin, without the rounding that a proof subtracts."""
    k, away = pairs.curvature, pairs.x0 - point
    direction = k[:, None] * away - gradient
    value = margin + (gradient * away).sum(1) - k / 2 * away.square().sum(1)
    minorant = Minorant(value, direction, torch.zeros_like(value), k, pairs.room)
    return minorant.radius() if radius is None else minorant.margin(radius)


def fixed_point(
    pairs: Pairs, point: Tensor, margin: Tensor, gradient: Tensor, radius: float | None
) -> Tensor:
    r"""Where a full step of :func:`search` ends: the best point, if the gradient were constant.

    Args:
        pairs: the margins.
        point: ``(pairs, n)`` points c.
        margin: ``(pairs,)`` values there.
        gradient: ``(pairs, n)`` gradients there.
        radius: as in :func:`search`.

    Returns:
        ``(pairs, n)`` points :math:`x_0 - \eta \nabla f(c)`, clipped to the box.
    """
    if radius is None:
        along = (gradient * (pairs.x0 - point)).sum(1)
        eta = step_to_boundary(margin + along, gradient, pairs.room)
    else:
        eta = step_to_sphere(gradient, radius, pairs.room)
    step = -eta.minimum(1 / pairs.curvature)[:, None] * gradient
    return pairs.x0 + (step if pairs.room is None else pairs.room.clip(step))
