r"""The theorem that every certificate rests on, in exact arithmetic, as the book teaches it.

Let :math:`f = z_y - z_t` be the margin of a label over another class, twice continuously
differentiable, and let no eigenvalue of its Hessian be below :math:`-k` anywhere, with
:math:`k \ge 0`. Then for every point c, f lies above a parabola that touches it there, and the
parabola answers two questions about an input :math:`x_0`: how far can it move before f vanishes,
and how small can f get within a given distance? (Singla & Feizi 2020, Theorems 1 and 2, with c in
place of their dual variable.)

The engine, :mod:`crcbook.proof`, does the same with every rounding subtracted; the tests hold it to
these lines. Distances are l2, in the units of the input.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def parabola(f: Callable[[Tensor], Tensor], x0: Tensor, c: Tensor, k: float) -> tuple[Tensor, ...]:
    r"""The parabola below f that touches it at c, seen from :math:`x_0`.

    .. math:: f(x_0 + \delta) \ge q - s \cdot \delta - \tfrac k2 \|\delta\|^2, \qquad
       q = f(c) + \nabla f(c) \cdot (x_0 - c) - \tfrac k2 \|x_0 - c\|^2, \quad
       s = k (x_0 - c) - \nabla f(c).

    Args:
        f: a function of one point ``(n,)``, twice continuously differentiable, that autograd can
            differentiate.
        x0: ``(n,)`` the input.
        c: ``(n,)`` any point: a bad one costs radius, never truth.
        k: no eigenvalue of the Hessian of f is below -k, at any point; at least 0.

    Returns:
        q, a scalar: the parabola's value at the input; and s, ``(n,)``: its gradient there,
        downward.
    """
    value, gradient = torch.func.grad_and_value(f)(c)[::-1]
    away = x0 - c
    return value + gradient @ away - k / 2 * away @ away, k * away - gradient


def radius(q: Tensor, s: Tensor, k: float) -> Tensor:
    r"""How far :math:`x_0` can move before the parabola vanishes, and so f not before it.

    Args:
        q: the parabola's value at the input.
        s: ``(n,)`` its gradient there, downward.
        k: how strongly it bends down, at least 0.

    Returns:
        The positive root of :math:`q - \|s\| r - \tfrac k2 r^2`, an l2 distance; 0 where q is not
        positive.
    """
    q, slope = q.clamp(min=0), s.norm()
    return 2 * q / (slope + (slope**2 + 2 * k * q).sqrt()) if q > 0 else q


def smallest_margin(q: Tensor, s: Tensor, k: float, rho: float) -> Tensor:
    r"""The parabola's smallest value within a distance of :math:`x_0`: f is nowhere smaller.

    Args:
        q: the parabola's value at the input.
        s: ``(n,)`` its gradient there, downward.
        k: how strongly it bends down, at least 0.
        rho: the l2 distance, at least 0.

    Returns:
        :math:`q - \rho\|s\| - \tfrac k2 \rho^2`.
    """
    return q - rho * s.norm() - k / 2 * rho**2


def curvature_of_two_layers(
    W: Tensor, w: Tensor, bends: tuple[float, float]
) -> tuple[float, float]:
    r"""Bounds of the Hessian's eigenvalues where :math:`f(x) = w \cdot \sigma(Wx + b) + \beta`.

    The Hessian is :math:`W^T \mathrm{diag}(w \odot \sigma'') W`, and :math:`\sigma''` ranges over
    an interval: the two extreme diagonals bound it from below and above, in the Loewner order
    (Singla & Feizi 2020, section 4). ``eigvalsh`` rounds and proves nothing; the engine proves its
    eigenvalues by a factorisation (Rump 2006).

    Args:
        W: ``(hidden, n)`` the first layer's weights; its rows are what the units look at.
        w: ``(hidden,)`` the second layer's weights of the label less those of the other class.
        bends: infimum and supremum of :math:`\sigma''`, the activation's second derivative.

    Returns:
        m, at most 0, and M, at least 0: k is -m.
    """
    ends = torch.stack([w * bends[0], w * bends[1]])
    lowest, highest = (W.T @ (d[:, None] * W) for d in (ends.amin(0), ends.amax(0)))
    m, M = torch.linalg.eigvalsh(lowest)[0], torch.linalg.eigvalsh(highest)[-1]
    return min(float(m), 0.0), max(float(M), 0.0)
