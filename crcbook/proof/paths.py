r"""Margins over a ball from a quadratic that follows the curvature outward.

Over a ball around :math:`x_0` the bound of a margin's curvature grows with the ball, for the slopes
and bends of the units range over longer intervals. A single number for the whole ball wastes what
is known near its centre. Let :math:`\nabla^2 f \succeq -A(t)` in the ball of radius t, with A
nondecreasing. Taylor's theorem with the remainder in integral form gives, for
:math:`\|\delta\| \le \rho`,

.. math:: f(x_0 + \delta) \ge f(x_0) + g \cdot \delta - \tfrac12 \delta^T \bar A \delta, \qquad
   \bar A = \int_0^1 2(1-s) A(s\rho)\,ds \preceq \sum_i w_i A(t_i), \quad
   w_i = (1 - t_{i-1}/\rho)^2 - (1 - t_i/\rho)^2,

for radii :math:`0 = t_0 < t_1 < \dots < t_m = \rho` (shells). The minimum of that quadratic over
the ball is a trust-region problem, bounded by its dual. Write :math:`\bar A = A_0 + cI`. For every
:math:`\lambda`, of any sign, with :math:`H = \lambda I - A_0 \succeq -\epsilon I`, and every y,

.. math:: \min_{\|\delta\| \le \rho} g\cdot\delta - \tfrac12\delta^T\bar A\delta \ge
   -\tfrac12 g\cdot y - (\rho + 2\|y\|)\,\|g - Hy\|
   - \tfrac\epsilon2 (\rho + \|y\|)^2 - \tfrac12 \max(0, \lambda + c)\,\rho^2,

so that neither :math:`\lambda` nor the solution y of :math:`Hy = g` has to be exact: put
:math:`\delta = e - y`. What rounding leaves open of H's factorisation is :math:`\epsilon`.

**The matrices.** With the notation of :mod:`crcbook.proof.curvature`, the Hessian is a sum of
:math:`B_I^T \mathrm{diag}(F_I \odot \sigma'') B_I`. Let :math:`-d_I(t)` be the smallest value of
the diagonal in the ball. :math:`B_1 = W_1` is constant, so the first term is at least
:math:`-W_1^T\mathrm{diag}(d_1)W_1`, negative entries included. For the others let :math:`M_I` be
the Jacobian at :math:`x_0` and :math:`B_I(x) = M_I + E_I(x)`; with
:math:`e_I \ge \|\mathrm{diag}(\sqrt{d_I^+})E_I\|` and any :math:`\epsilon > 0`

.. math:: B_I^T \mathrm{diag}(d_I^+) B_I \preceq (1 + \epsilon) M_I^T \mathrm{diag}(d_I^+) M_I
   + (1 + 1/\epsilon) e_I^2 I .

**How far the Jacobians stray.** If the slopes of a layer differ from those at :math:`x_0` by at
most r(t), :math:`E_{I+1} = W_{I+1}(\mathrm{diag}(\sigma'(x) - \sigma'(x_0)) M_I +
\mathrm{diag}(\sigma'(x)) E_I)`, and the norms of its two parts, of the whole matrix and of each
row, follow from :math:`\|W\mathrm{diag}(\sqrt r)\| \|\mathrm{diag}(\sqrt r)M\|` and
:math:`\|W\mathrm{diag}(\sup|\sigma'|)\| \|E_I\|`. Each preactivation then moves at most by the
integral of its row's norm along the way. Norms are proved at the outermost shell only: where
:math:`r(t_i) \le \alpha_i r(\rho)`, they shrink with :math:`\alpha_i`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crcbook.power_iteration import eigenpairs_estimate, top_eigenvalue_estimate
from crcbook.proof.arithmetic import OUTWARD, TINY, TINY_NORM, UNIT, gamma
from crcbook.proof.box import Allowed
from crcbook.proof.curvature import bend_depths
from crcbook.proof.eigenvalues import spectral_norm_bound
from crcbook.proof.intervals import Ranges, preactivation_intervals, ranges_of, widened
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.shells import SHELLS, shells

_POWER_STEPS = 8
_BISECTIONS = 60
_SLACKS = (1e-5, 1e-4, 1e-2, 1.0)  # of the largest eigenvalue, above its estimate


@dataclass(frozen=True)
class _Stray:
    """How far a layer's Jacobian is from that at the input, in its parts.

    Its spectral norm is at most ``shrink * |outer| * inner + rest``, shell by shell.
    """

    outer: Tensor
    inner: float
    shrink: Tensor
    rest: Tensor

    def norm(self, scales: Tensor) -> Tensor:
        """``(shells,)`` bounds with the rows scaled by the roots of ``(shells, width)`` rows."""
        largest, last = scales.amax(1), scales[-1]
        if largest[-1] == 0:
            return torch.zeros_like(largest)
        share = (scales / last.clamp(min=torch.finfo(last.dtype).tiny)).amax(1).clamp(max=1)
        outer = spectral_norm_bound(last.sqrt()[:, None] * self.outer)
        first = share.sqrt() * self.shrink * outer * self.inner
        return (first + largest.sqrt() * self.rest) * OUTWARD


@dataclass(frozen=True)
class Neighbourhood:
    """What is known of a network in the balls around an input, shell by shell.

    Attributes:
        prover: the float64 network, which has a hidden layer, with its error bounds.
        x: ``(n,)`` the input.
        radii: ``(shells,)`` radii of the shells.
        jacobians: of each hidden layer's preactivations at the input, ``(width, n)``.
        strays: how far each but the first strays from that; the first is constant.
        ranges: of each hidden layer's slopes and bends, ``(shells, width)`` each.
    """

    prover: Prover
    x: Tensor
    radii: Tensor
    jacobians: list[Tensor]
    strays: list[_Stray]
    ranges: list[Ranges]

    @classmethod
    def of(
        cls, prover: Prover, x: Tensor, radius: float, allowed: Allowed | None = None
    ) -> "Neighbourhood":
        """Follow the ranges and the Jacobians outward, layer by layer.

        Args:
            prover: the float64 network with its error bounds.
            x: ``(n,)`` float64, the input.
            radius: the ball's l2 radius.
            allowed: the displacements that the box leaves, ``(1, n)``; None for all.

        Returns:
            The neighbourhood.
        """
        network, rounding = prover.network, prover.rounding
        ends, _ = shells(x)
        found = cls(prover, x, float(radius) * ends, [], [], [])
        values = network.preactivations(x[None])
        errors = rounding.preactivation_errors(x[None].norm(dim=1))
        steps = found.radii.diff(prepend=found.radii.new_zeros(1))[:, None]
        shared = x.expand(SHELLS, -1)
        bounds = preactivation_intervals(rounding, shared, found.radii, allowed)
        rows = found._first_rows()
        for place, layer in enumerate(network.layers[:-1]):
            z = values[place][0]
            reach = (steps * rows).cumsum(0) * OUTWARD + errors[place]
            low, high = widened(z - reach, z + reach)
            low, high = low.maximum(bounds[place][0]), high.minimum(bounds[place][1])
            found.ranges.append(ranges_of(layer, low, high))
            if place + 2 < len(network.layers):
                rows = found._carry(place, layer.activation.slope(z), *found.ranges[-1][:2])
        return found

    def _first_rows(self) -> Tensor:
        weight = self.prover.network.layers[0].weight
        self.jacobians.append(weight)
        return _row_norms(weight).expand(len(self.radii), -1)

    def _carry(self, place: int, slope: Tensor, least: Tensor, most: Tensor) -> Tensor:
        """The next layer's Jacobian; returns bounds of its rows' norms, shell by shell."""
        weight, before = self.prover.network.layers[place + 1].weight, self.jacobians[place]
        carried = weight * slope
        entries = gamma(carried.numel() + before.numel() + 4)
        size = float(carried.norm()) * float(before.norm()) * (1 + entries)
        error = gamma(weight.shape[1] + 6) * size * OUTWARD
        spread = torch.maximum(most - slope, slope - least) * OUTWARD + UNIT
        spread = spread.cummax(0).values
        last = spread[-1]
        shrink = (spread / last).amax(1) * OUTWARD
        inner = spectral_norm_bound(last.sqrt()[:, None] * before) * OUTWARD
        outer = weight * last.sqrt()
        rows = shrink[:, None] * inner * _row_norms(outer)
        rest = torch.full_like(self.radii, error)
        if place > 0:
            steep = weight * torch.maximum(most[-1].abs(), least[-1].abs())
            stray = self.strays[place - 1].norm(torch.ones_like(spread))
            rest = rest + spectral_norm_bound(steep) * stray
            rows = rows + _row_norms(steep) * stray[:, None]
        self.jacobians.append(carried @ before)
        self.strays.append(_Stray(outer, inner, shrink, rest * OUTWARD))
        return (_row_norms(self.jacobians[-1]) + rows + error) * OUTWARD

    def margin(self, entry: Entries) -> Tensor:
        """A proved lower bound of a margin in the outermost ball.

        Args:
            entry: a single margin at this input; its curvature is left aside.

        Returns:
            A scalar; minus infinity where something overflowed.
        """
        diagonal, constant = self._quadratic(entry.label, entry.target, shells(self.x)[1])
        flat = replace(entry, curvature=torch.zeros_like(entry.curvature), allowed=None)
        tangent, _ = self.prover.prove(flat, torch.zeros_like(entry.x))
        radius = float(self.radii[-1])
        least = _trust_region_bound(
            torch.cat(self.jacobians), diagonal, constant, -tangent.direction[0], radius
        )
        value, lost = tangent.value[0], tangent.error[0] * radius
        margin = value + least - (lost + 8 * UNIT * (value.abs() + least.abs())) * OUTWARD - TINY
        return torch.where(margin.isnan(), -torch.inf, margin)

    def _quadratic(self, label: Tensor, target: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonal and the constant of the matrix that bounds the Hessian along the way."""
        network = self.prover.network
        depths = bend_depths(network.layers, network.margin_weights(label, target), self.ranges)
        first = depths[0].cummax(0).values
        # The shares add up to 1 with an error that a negative entry must not gain from.
        slack = 4 * (OUTWARD - 1) * first.abs().amax(0)
        diagonals = [(shares[:, None] * first).sum(0) + slack]
        constant = shares.new_zeros(())
        for depth, jacobian, stray in zip(depths[1:], self.jacobians[1:], self.strays, strict=True):
            depth = depth.clamp(min=0).cummax(0).values
            off = stray.norm(depth)
            sizes = (depth.amax(1) / depth.amax().clamp(min=TINY)).sqrt()
            start = (depth[-1].sqrt() @ jacobian.abs())[None]
            top, _ = top_eigenvalue_estimate([jacobian], depth[-1:], start, _POWER_STEPS)
            size = sizes * top[0].sqrt()
            size = size.clamp(min=TINY_NORM)
            grown = shares * (1 + off / size) * OUTWARD
            diagonals.append((grown[:, None] * depth).sum(0) * OUTWARD)
            constant = constant + (shares * (off.square() + off * size)).sum() * OUTWARD
        return torch.cat(diagonals), constant


def _trust_region_bound(
    rows: Tensor, diagonal: Tensor, constant: Tensor, gradient: Tensor, radius: float
) -> Tensor:
    r"""A proved lower bound of the least :math:`g\cdot\delta - \tfrac12\delta^T(V^TDV + cI)\delta`.

    Args:
        rows: ``(rows, n)`` V.
        diagonal: ``(rows,)`` D, of any sign.
        constant: c, at least 0.
        gradient: ``(n,)`` g.
        radius: of the ball that :math:`\delta` stays in.

    Returns:
        A scalar; minus infinity where nothing was proved.
    """
    order = rows.shape[1]
    matrix = rows.T @ (diagonal[:, None] * rows)
    total = (diagonal.abs() * rows.square().sum(1)).sum()
    best = torch.full_like(constant, -torch.inf)
    if not ((total + constant).isfinite() and gradient.isfinite().all()):
        return best
    identity = torch.eye(order, dtype=rows.dtype, device=rows.device)
    matrix_error = 2 * (len(rows) + 8) * UNIT * total
    for multiplier in _multipliers(matrix, gradient, radius, -constant):
        shifted = multiplier * identity - matrix
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if failed:
            continue
        y = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        length = y.norm()
        rest = gradient - shifted @ y
        product_error = gamma(order + 8) * (multiplier.abs() + total) * length
        off = rest.norm() * OUTWARD + product_error + matrix_error * length
        off = off + gamma(8) * gradient.norm()
        # The shifted matrix may have eigenvalues this little below 0.
        below = matrix_error + 4 * (order + 4) * UNIT * (order * multiplier.abs() + total)
        reach = radius + length * OUTWARD
        half = (gradient * y).sum() / 2
        half = half + gamma(order + 8) * gradient.norm() * length
        fall = half + off * (reach + length) + below * (reach * reach) / 2
        fall = fall + (multiplier + constant).clamp(min=0) * (radius * radius) / 2
        best = -(fall + fall.abs() * 64 * UNIT + 64 * UNIT * half.abs()) - TINY
        break
    return best


def _multipliers(
    matrix: Tensor, gradient: Tensor, radius: float, least: Tensor
) -> Iterator[Tensor]:
    """Guesses of the best multiplier, each safer than the one before."""
    values, vectors = eigenpairs_estimate(matrix)
    parts = (vectors.T @ gradient).square()
    size = values.abs().amax()
    for slack in _SLACKS:
        low = torch.maximum(values[-1] + slack * size, least)
        high = low + gradient.norm() / radius
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            beyond = (parts / (middle - values).square()).sum() > radius * radius
            low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
        yield high


def _row_norms(matrix: Tensor) -> Tensor:
    return matrix.norm(dim=1) * (1 + gamma(matrix.shape[1] + 4)) + UNIT * matrix.abs().amax()
