r"""The search for the best quadratic: a fixed-point iteration, accelerated.

Nothing rests on whether it converged: a point that it returns is proved at, by
:mod:`crcbook.proof.prover`, like any other.
"""

import torch
from torch import Tensor

from crcbook.acceleration import Acceleration
from crcbook.certificate.question import Question
from crcbook.networks import Network
from crcbook.proof.arithmetic import DOUBLE, SINGLE
from crcbook.proof.prover import Entries, Evaluation, evaluate
from crcbook.proof.quadratic import Quadratic

# A relative gain below the first number counts as none, and so many steps without one end a search.
# The second pair is for where another search goes on. Both are tuned on MNIST: a search that ends
# sooner takes less time and leaves smaller bounds.
_FINE, _ROUGH = (1e-5, 10), (3e-3, 2)
_SETTLED = 1e-5  # of the distance; what is left to gain is of the order of its square


def search(
    network: Network,
    question: Question,
    entries: Entries,
    start: Tensor,
    steps: int,
    rough: bool = False,
) -> Tensor:
    r"""Look for the points of the best quadratics.

    The best displacement is the fixed point of :math:`d \mapsto -\eta \nabla f(x_0 + d)`.
    :math:`\eta` is the dual variable: for a radius it makes the linearised margin vanish, for a
    ball it puts the point on the sphere; never more than 1/k, where the dual ends. Repeating the
    map would cycle where a margin is strongly curved; :mod:`crcbook.acceleration` makes it
    converge.

    Args:
        network: the network, in the precision of the search; its first layer may be one of fewer
            inputs, in whose coordinates the displacements are.
        question: a :class:`crcbook.certificate.question.Question`.
        entries: the margins.
        start: ``(entries, n)`` displacements to start from.
        steps: at most so many gradients an entry.
        rough: stop early: another search goes on.

    Returns:
        ``(entries, n)`` displacements, finite, in the network's precision.
    """
    dtype = network.dtype
    entries = entries.to(dtype)
    least, patience = _ROUGH if rough else _FINE
    best = torch.full_like(entries.curvature, -torch.inf)
    d = start.to(dtype)
    found, enough = d.clone(), entries.goal + 4 * torch.finfo(dtype).eps * (1 + entries.goal.abs())
    active = torch.arange(len(best), device=best.device)
    stalled, acceleration = torch.zeros_like(active), Acceleration()
    for _ in range(steps if len(active) else 0):
        evaluation = evaluate(network, entries, d)
        bound = _bound_estimate(question, entries, d, evaluation)
        gain = bound - best[active]
        better = (gain > 0).nonzero().squeeze(1)
        best[active[better]] = bound[better]
        found.index_copy_(0, active[better], d.index_select(0, better))
        stalled = torch.where(gain > least * bound.abs(), 0, stalled + 1)
        keep = ~question.refuted(entries, d, evaluation.margin)
        move = next_point(question, entries, evaluation) - d
        d = d + acceleration.step(d, move)
        left = move.norm(dim=1)
        keep &= left.isfinite() & ~(left <= _SETTLED * d.norm(dim=1))
        keep &= (stalled < patience) & ~(best[active] > enough[active])
        if not keep.all():
            index = keep.nonzero().squeeze(1)
            if not len(index):
                break
            active, stalled, d = active[index], stalled[index], d.index_select(0, index)
            entries, acceleration = entries.take(index), acceleration.take(index)
    return torch.where(found.isfinite(), found, start.to(dtype))


def next_point(question: Question, entries: Entries, evaluation: Evaluation) -> Tensor:
    r"""Where a full step of :func:`search` ends: the best point, if the gradient were constant.

    Args:
        question: the question.
        entries: the margins.
        evaluation: margins and gradients at the present points.

    Returns:
        ``(entries, n)`` displacements :math:`-\eta \nabla f(c)`, clipped to the box.
    """
    gradient = evaluation.gradient
    linear = (evaluation.margin - evaluation.along).to(gradient.dtype)
    eta = question.step(entries, linear, gradient)
    step = -eta.minimum((1 / entries.curvature).to(eta.dtype))[:, None] * gradient
    return step if entries.allowed is None else entries.allowed.clip(step)


def _bound_estimate(
    question: Question, entries: Entries, d: Tensor, evaluation: Evaluation
) -> Tensor:
    """What the quadratics would prove without the rounding that a proof subtracts."""
    k = entries.curvature.to(d.dtype)
    value = evaluation.margin - evaluation.along - k / 2 * d.square().sum(1)
    direction = -torch.addcmul(evaluation.gradient, k[:, None], d)
    used = DOUBLE if d.dtype == torch.float64 else SINGLE
    quadratic = Quadratic(value, direction, torch.zeros_like(value), k, entries.allowed, used)
    return question.proves(entries, quadratic).double()
