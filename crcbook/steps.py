r"""Steps of searches and attacks: where a linear function falls to 0, or falls most.

The point of a ball in a box where a linear function with gradient g falls most is
:math:`x_0 + \mathrm{clip}(-\eta g)` for some :math:`\eta`; the functions here find it.
"""

import torch
from torch import Tensor

from crcbook.proof.box import Allowed

_PASSES = 4  # of clipping: each frees or holds coordinates; more hardly change a step


def step_to_boundary(margin: Tensor, gradient: Tensor, allowed: Allowed | None) -> Tensor:
    r"""The :math:`\eta` at which a linear margin vanishes at :math:`\mathrm{clip}(-\eta g)`.

    Args:
        margin: ``(pairs,)`` the linear margin at the input.
        gradient: ``(pairs, n)`` its gradient g.
        allowed: the displacements that the box leaves; None for all.

    Returns:
        ``(pairs,)``, at least 0; infinity where the margin does not vanish in the box.
    """
    square = gradient.square()
    eta = margin / square.sum(1)
    for _ in range(_PASSES):
        if allowed is None:
            break
        free, fixed = _split(eta, gradient, allowed)
        eta = (margin + (gradient * fixed).sum(1)) / (square * free).sum(1)
    return eta.clamp(min=0)


def step_to_sphere(gradient: Tensor, radius: float | Tensor, allowed: Allowed | None) -> Tensor:
    r"""The :math:`\eta` at which :math:`\mathrm{clip}(-\eta g)` has the length ``radius``.

    Args:
        gradient: ``(pairs, n)`` g.
        radius: the l2 length, a number or ``(pairs,)`` of them.
        allowed: the displacements that the box leaves; None for all.

    Returns:
        ``(pairs,)``, at least 0; infinity where the box lies inside the ball.
    """
    square = gradient.square()
    eta = radius / square.sum(1).sqrt()
    for _ in range(_PASSES):
        if allowed is None:
            break
        free, fixed = _split(eta, gradient, allowed)
        left = (radius * radius - fixed.square().sum(1)).clamp(min=0)
        eta = (left / (square * free).sum(1)).sqrt()
    return eta


def _split(eta: Tensor, gradient: Tensor, allowed: Allowed) -> tuple[Tensor, Tensor]:
    """Which coordinates are free at a step, and where the others are held."""
    wanted = -eta[:, None] * gradient
    clipped = allowed.clip(wanted)
    free = clipped == wanted
    return free, torch.where(free, 0.0, clipped)
