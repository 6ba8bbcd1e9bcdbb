r"""Proofs in single precision, for margins that are far from deciding anything.

Most classes lie well beyond the nearest one, and to say so needs few digits. Here a margin and its
gradient are evaluated in float32 at :math:`c = x_0 + d`: all but the first layer's preactivations
at the input, :math:`z_0`, which stay as float64 found them. What rounding can have done is bounded
as in :mod:`crcbook.proof.rounding`, with the unit roundoff :math:`u = 2^{-24}`, and subtracted: a
bound found here is as sound as any other, only less tight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.acceleration import Acceleration
from crcbook.activations import ROUNDING
from crcbook.networks import Layer, Network
from crcbook.proof.arithmetic import (
    OUTWARD,
    SINGLE_TINY,
    SINGLE_TINY_NORM,
    SINGLE_UNIT,
    UNIT,
    gamma,
)
from crcbook.proof.quadratic import Pairs, Prover, parabola_margin, parabola_radius
from crcbook.stages.search import SEARCH_STEPS, search

_STEPS = 3
_ROUNDING = ROUNDING * SINGLE_UNIT / UNIT  # of an activation evaluated in float32
_LARGEST = 1e30  # where every product stays below it, nothing overflows


@dataclass(frozen=True)
class Margins:
    """Margins to bound, one input and one pair of classes each.

    Attributes:
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
        curvature: ``(pairs,)`` float64, proved bounds k.
        z: ``(pairs, width)`` float32, the first layer's preactivations at the inputs, rounded from
            what float64 computed.
        z_error: ``(pairs,)`` how far those of float64 are from the true ones, in the l2 norm.
        limit: ``(pairs,)`` bounds that are good enough; infinity where none is.
    """

    label: Tensor
    target: Tensor
    curvature: Tensor
    z: Tensor
    z_error: Tensor
    limit: Tensor

    def take(self, index: Tensor) -> "Margins":
        """Some of the margins.

        Args:
            index: positions.

        Returns:
            The chosen ones.
        """
        return Margins(*(column.index_select(0, index) for column in vars(self).values()))


@dataclass(frozen=True)
class Sieve:
    r"""A network in single precision, with its error bounds.

    With :math:`\gamma_k` for :math:`u = 2^{-24}`, and :math:`F_I = \|W_I\|_F`:

    - :math:`\Delta z = W_1 d` errs by :math:`\gamma_{n+4} F_1 \|d\|`, and :math:`z_0 + \Delta z`
      by :math:`4u` times the sizes of both more;
    - the value errs by :math:`\|w\|` times what the activations do, and by
      :math:`\gamma_{h+4}\|w\| + 4u(\|w_y\| + \|w_t\|)` times their size, the second for the rounded
      rows;
    - the slopes of the last hidden layer multiply weights of at most :math:`\|w\|_\infty`, and the
      last product adds :math:`\gamma_{h+4} F_1 \|v\|`, with the computed v;
    - :math:`\nabla f \cdot d` is evaluated as :math:`v \cdot \Delta z`.

    The first layer's largest singular directions, V, hold most of a gradient: searches start there,
    at :math:`d = Vu`, where a step takes a third of the time. What V leaves out would only show in
    the points found, not in what is proved at them.

    Attributes:
        prover: the float64 network with its error bounds.
        network: the network in single precision, without the first bias, which is in the
            preactivations of the inputs.
        reduced: the same as a function of u: its first layer is :math:`W_1V`.
        basis: ``(n, rank)`` V, rounded to single precision.
        reach: a proved bound of the norm of V.
    """

    prover: Prover
    network: Network
    reduced: Network
    basis: Tensor
    reach: float

    @classmethod
    def of(cls, prover: Prover) -> "Sieve | None":
        """The sieve of a network.

        Args:
            prover: the float64 network with its error bounds.

        Returns:
            The sieve; None where the first layer has no sketch, or single precision is not what it
            should be (TF32, bfloat16).
        """
        sketch, (first, *rest) = prover.sketch, prover.network.layers
        if sketch is None or prover.quick != torch.float32:
            return None
        whole, reduced = (
            Network((Layer(weight, torch.zeros_like(first.bias), first.activation), *rest)).to(
                torch.float32
            )
            for weight in (first.weight, sketch.image)
        )
        return cls(prover, whole, reduced, sketch.basis.float(), sketch.norm)

    def search(self, margins: Margins, way: Tensor) -> Tensor:
        r"""Points with large radii, from the steps of :func:`crcbook.stages.search.search` in u.

        Args:
            margins: the margins.
            way: ``(pairs, rank)`` float32, where to start.

        Returns:
            ``(pairs, n)`` float32 displacements.
        """
        origin, limit = torch.zeros_like(way), margins.limit
        pairs = Pairs(origin, margins.label, margins.target, margins.curvature, None, margins.z)
        u, _ = search(self.reduced, pairs, way, SEARCH_STEPS, limit, rough=True)
        return u.to(way.dtype) @ self.basis.T

    def sift(
        self, margins: Margins, way: Tensor, radius: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Bounds of margins, from a few steps each, all but the first in all directions.

        Args:
            margins: the margins.
            way: ``(pairs, rank)`` float32, what u to look at first.
            radius: of the ball to bound the margins in; None for radii.

        Returns:
            ``(pairs,)`` float64 bounds, minus infinity where nothing is proved; the positions of
            the ``(left,)`` pairs whose bounds are not good enough; and ``(left, n)`` float32
            displacements to search on from.
        """
        bound, facts = torch.full_like(margins.limit, -torch.inf), self._facts(margins)
        rows, d = torch.arange(len(bound), device=bound.device), None
        acceleration = Acceleration()
        change, reach = way @ self.reduced.layers[0].weight.T, way.norm(dim=1).double() * self.reach
        for _ in range(_STEPS):
            eta, gradient, found = self._evaluate(margins, facts, change, reach, d, radius)
            bound[rows] = bound[rows].maximum(found)
            short = (found <= margins.limit).nonzero().squeeze(1)
            rows, margins, facts = rows[short], margins.take(short), facts[:, short]
            goal = -eta[short, None] * gradient.index_select(0, short)
            d = way[short] @ self.basis.T if d is None else d.index_select(0, short)
            acceleration = acceleration.take(short)
            d = d + acceleration.step(d, goal - d)
            change, reach = d @ self.network.layers[0].weight.T, d.norm(dim=1).double()
        return bound, rows, d.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _facts(self, margins: Margins) -> Tensor:
        """Of the classes of each pair, what the errors depend on: a row each."""
        rows = self.prover.network.layers[-1].weight.norm(dim=1)

        def of_classes(weights: Tensor, offset: Tensor) -> Tensor:
            deviation = self.prover.rounding.deviation(weights)
            return torch.stack([offset, deviation, weights.norm(dim=1), weights.abs().amax(1)])

        columns = self.prover.of_classes(of_classes, margins.label, margins.target)
        return torch.cat([columns, (rows[margins.label] + rows[margins.target])[None]])

    def _evaluate(self, margins: Margins, facts: Tensor, change: Tensor, reach: Tensor, d, radius):
        """Steps to the next points along the gradients there, the gradients, and the bounds.

        ``change`` is what the displacements change the first preactivations by, ``reach`` how long
        they are, and ``d`` is None where they have only coordinates in the subspace.
        """
        z, k = margins.z + change, margins.curvature
        active, slopes = self.network.forward(z)
        weights = self.network.margin_weights(margins.label, margins.target)
        margin = (weights * active).sum(1).double() + facts[0]
        units = self.network.backward(weights, slopes)
        along = (units * change).sum(1).double()
        gradient = units @ self.network.layers[0].weight
        columns = z, change, active, units, gradient
        sizes = _upward(columns, reach, *(column.norm(dim=1).double() for column in columns))
        reach, *_, steepness = sizes
        error, slope_error, along_error = self._errors(margins, facts, *sizes[:-1])
        bend = k * reach.square()
        rounded = 8 * UNIT * (margin.abs() + facts[0].abs() + along.abs() + bend)
        value = margin - along - bend / 2 - (error + along_error + rounded) * OUTWARD
        if d is None:  # the square of the slope, summed in float64
            rounded = 8 * UNIT * ((steepness + slope_error).square() + k * (bend + along.abs()))
            square = (steepness + slope_error).square() + k * (bend + 2 * (along + along_error))
            slope = (square + rounded).clamp(min=0).sqrt()
        else:
            tilted = torch.addcmul(gradient, k[:, None].float(), d)
            (slope,) = _upward(columns, tilted.norm(dim=1).double())
            # The second is for a k that float32 cannot hold.
            slope = slope + slope_error + 4 * SINGLE_UNIT * (steepness + k * reach)
            slope = slope + SINGLE_TINY * reach
        slope = slope * OUTWARD
        if radius is None:
            bound, eta = parabola_radius(value, slope, k), (margin - along) / steepness.square()
        else:
            bound, eta = parabola_margin(value, slope, k, radius), radius / steepness
        usable = value.isfinite() & slope.isfinite()
        eta = eta.clamp(min=0).fmin(1 / k).float()
        return eta, gradient, torch.where(usable, bound, -torch.inf)

    def _errors(self, margins: Margins, facts: Tensor, reach, z, change, active, units):
        """Bounds of the errors of margins, of their gradients, and of these along displacements.

        The last five arguments are norms, rounded upward: of the displacements, and of what was
        computed of the first preactivations, their change, the last activations, and the gradients
        in the first preactivations.
        """
        _, deviation, weights, most, rows = facts
        moved, steps, error, largest = self._forward_errors(margins, reach, z, change)
        terms = gamma(self.network.layers[-1].weight.shape[1] + 4, SINGLE_UNIT)
        value = weights * error + deviation
        value = value + (terms * weights + 4 * SINGLE_UNIT * rows + SINGLE_TINY) * active
        slack, size, entry = 2 * SINGLE_UNIT * rows, weights, most
        for (layer, norm, frobenius), step in zip(
            reversed(list(self.prover.rounding.hidden())), reversed(steps), strict=True
        ):
            row, terms = layer.activation, gamma(layer.weight.shape[0] + 4, SINGLE_UNIT)
            rounded = 2 * (_ROUNDING + SINGLE_UNIT) * row.max_slope * (size + slack)
            slack = row.max_slope * slack + entry * row.max_bend * step + rounded + SINGLE_TINY
            size, unit_slack = row.max_slope * size, slack
            computed = units if step is steps[0] else size + slack
            slack = norm * slack + (terms * frobenius + SINGLE_TINY) * computed + SINGLE_TINY
            size = norm * size
            entry = size + slack
        along = (unit_slack + terms * units) * change + (units + unit_slack) * moved
        fits = largest * (1 + rows) * (1 + units) < _LARGEST
        return tuple(
            torch.where(fits, bound * OUTWARD + SINGLE_TINY, torch.inf)
            for bound in (value, slack, along)
        )

    def _forward_errors(self, margins: Margins, reach: Tensor, z: Tensor, change: Tensor):
        """Error bounds: of the change, of each preactivation, of the last activation.

        The fourth result is no smaller than any intermediate size.
        """
        size, error, largest, steps = z, margins.z_error, 1 + z + reach, []
        for layer, norm, frobenius in self.prover.rounding.hidden():
            row, bias = layer.activation, float(layer.bias.norm())
            terms = gamma(layer.weight.shape[1] + 4, SINGLE_UNIT)
            if steps:
                error = norm * error + (terms * frobenius + SINGLE_TINY) * (size + error)
                error, size = error + terms * bias, norm * size + bias
            else:
                moved = (terms * frobenius + SINGLE_TINY) * reach + SINGLE_TINY
                error = error + moved + 4 * SINGLE_UNIT * (size + change)
            steps.append(error + SINGLE_TINY)
            at_zero = abs(float(row.value(layer.bias.new_zeros(1)))) * len(layer.bias) ** 0.5
            size = row.max_slope * size + at_zero
            error = row.max_slope * (1 + _ROUNDING) * steps[-1] + _ROUNDING * size + SINGLE_TINY
            largest = largest * (1 + frobenius + bias) * (1 + row.max_slope + at_zero)
        return moved, steps, error, largest


def _upward(columns: tuple[Tensor, ...], *norms: Tensor) -> list[Tensor]:
    """Norms that float32 computed of vectors as long as the columns, rounded upward."""
    longest = max(column.shape[1] for column in columns)
    terms = 1 + gamma(longest + 8, SINGLE_UNIT)
    return [norm * terms + SINGLE_TINY_NORM for norm in norms]
