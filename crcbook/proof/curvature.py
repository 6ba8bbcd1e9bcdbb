r"""Bounds of a margin's curvature: m and M with :math:`mI \preceq \nabla^2 f(x) \preceq MI`.

With :math:`B_I = \partial z^{(I)}/\partial x` and :math:`F_I = \partial f/\partial a^{(I)}`, the
Hessian of a margin is (Singla & Feizi 2020, Theorem 3)

.. math:: \nabla^2 f = \sum_{I=1}^{L-1} B_I^T \mathrm{diag}(F_I \odot \sigma''(z^{(I)})) B_I .

Let :math:`-d_j` be the smallest value a diagonal entry can take. In the first layer
:math:`B_1 = W_1` is constant, and the term's smallest eigenvalue is at least
:math:`-\lambda_{\max}(W_1^T \mathrm{diag}(d) W_1)`: with one hidden layer, that is m. Each other
term adds at most :math:`\|\mathrm{diag}(\sqrt{d}) B_I\|^2`, with negative d replaced by 0. There
the slopes between the layers vary, :math:`\sigma' = c + r \odot e` with :math:`|e| \le 1`, and

.. math:: \|\mathrm{diag}(\sqrt d) W_I \mathrm{diag}(\sigma') B_{I-1}\| \le
   \|\mathrm{diag}(\sqrt d) W_I \mathrm{diag}(c) B_{I-1}\| +
   \|\mathrm{diag}(\sqrt d) W_I \mathrm{diag}(\sqrt r)\| \|\mathrm{diag}(\sqrt r) B_{I-1}\|,

applied again to the first term until the input is reached: up to twice tighter a layer than the
product of norms. Over all of R^n the ranges of :math:`\sigma'` and :math:`\sigma''` are those of
the table; over a ball, or a ball in a box, the norms of the rows of :math:`B_I` say how far each
:math:`z^{(I)}` can move, and the ranges shrink to those intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crcbook.networks import Layer, Network, remembered
from crcbook.proof.arithmetic import OUTWARD, UNIT, gamma, matrix_interval
from crcbook.proof.eigenvalues import top_eigenvalue_bound
from crcbook.proof.intervals import (
    Interval,
    Ranges,
    Region,
    activation_ranges,
    line_ranges,
    preactivation_intervals,
    ranges_of,
    widened,
)
from crcbook.proof.rounding import RoundingModel

_CHUNK_ENTRIES = 1024  # whose ranges are formed at a time, 8 KB a layer of 1024 units each


def downward_curvature(network: Network, label: Tensor, target: Tensor) -> Tensor:
    r"""Proved bounds of :math:`|m| = -m`: how fast a margin can bend towards the boundary.

    They hold over all of R^n. Since :math:`z_t - z_y = -f`, the upper bound M of a pair (y, t) is
    :math:`|m|` of (t, y). Each pair is computed once a network and remembered under the hash of its
    weights.

    Args:
        network: the float64 network.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.

    Returns:
        ``(pairs,)`` float64, at least 0.
    """
    table = curvature_table(network)
    found = table[label, target]
    missing = found.isnan()
    if missing.any():
        *pairs, _ = network.distinct_pairs(label[missing], target[missing])
        weights = network.margin_weights(*pairs)
        table[pairs[0], pairs[1]] = curvature_sum(network.layers, weights, proved)
        found = table[label, target]
    return found


@remembered
def curvature_table(network: Network) -> Tensor:
    """What :func:`downward_curvature` knows of a network already.

    Args:
        network: the float64 network.

    Returns:
        ``(classes, classes)`` float64, NaN where nothing is known yet.
    """
    size = (network.classes, network.classes)
    return torch.full(size, torch.nan, dtype=torch.float64, device=network.device)


@dataclass(frozen=True)
class Link:
    """A term of a Jacobian's bound: a product of weights and slopes.

    Attributes:
        weight: ``(width, ...)``, the first matrix of the product.
        factor: what its norm counts, a float or a scalar tensor.
        before: the link that is the rest of the product; None where there is no more.
    """

    weight: Tensor
    factor: float | Tensor
    before: "Link | None" = None

    @property
    def matrices(self) -> list[Tensor]:
        """The matrices of the product, in its order: all that a power iteration needs."""
        return [self.weight, *(self.before.matrices if self.before else [])]

    @cached_property
    def matrix(self) -> Tensor:
        """The product, ``(width, n)``, computed where a proof asks for it."""
        return self.weight @ self.before.matrix if self.before else self.weight

    @cached_property
    def error(self) -> float:
        """A bound of the spectral norm of the computed product's error."""
        if not self.before:
            return 0.0
        terms = gamma(self.weight.shape[1] + 4)
        size, rest = (
            float(matrix.norm()) * (1 + gamma(matrix.numel() + 2))
            for matrix in (self.weight, self.before.matrix)
        )
        return size * (self.before.error + terms * (rest + self.before.error)) * OUTWARD


TopEigenvalue = Callable[[str, Link, Tensor], Tensor]
RangesOf = Callable[[int, list[Link]], Ranges]


def curvature_sum(
    layers: Sequence[Layer],
    weights: Tensor,
    top: TopEigenvalue,
    local_ranges: RangesOf | None = None,
) -> Tensor:
    r"""The bound of :math:`|m|` of this module's formula, for several margins.

    One formula serves the proof over R^n, the proof over a region and the training; only ``top``
    and ``local_ranges`` differ.

    Args:
        layers: the network's layers.
        weights: ``(pairs, width)`` last-layer rows of the margins.
        top: called with a name for the place, a link and ``(pairs, width)`` rows d, it returns
            ``(pairs,)`` values of :math:`\max(0, \lambda_{\max}(M^T \mathrm{diag}(d) M))`.
        local_ranges: called with a hidden layer's position and its links, it returns the ranges
            ``(width,)`` of the layer's slopes and bends, lowest and highest; those over the whole
            line where None.

    Returns:
        ``(pairs,)``, at least 0.
    """
    chains, ranges = jacobian_chains(layers[:-1], top, local_ranges)
    first, *inner = bend_depths(layers, weights, ranges) or [weights.new_zeros(len(weights), 1)]
    if not chains:
        return weights.new_zeros(len(weights))
    # The first Jacobian is constant: units that bend the margin up may count against the others.
    total = top("curve0", chains[0][0], first)
    for place, depths in enumerate(inner, start=1):
        norm = _chain_norm(chains[place], f"curve{place}", depths.clamp(min=0), top)
        total = total + norm**2
    return total * OUTWARD


def jacobian_chains(
    layers: Sequence[Layer], top: TopEigenvalue, local_ranges: RangesOf | None = None
) -> tuple[list[list[Link]], list[Ranges]]:
    """The terms of each layer's Jacobian, and the ranges of its slopes and bends.

    Args:
        layers: the layers to carry the input's Jacobian through.
        top: as in :func:`curvature_sum`.
        local_ranges: as in :func:`curvature_sum`.

    Returns:
        A list of links and a tuple of ranges a layer.
    """
    local_ranges = local_ranges or (lambda place, _: line_ranges(layers[place]))
    chains: list[list[Link]] = []
    ranges: list[Ranges] = []
    for place, layer in enumerate(layers):
        chains.append(_links(layer.weight, place, chains, ranges, top))
        ranges.append(local_ranges(place, chains[-1]))
    return chains, ranges


def _links(
    weight: Tensor, place: int, chains: list[list[Link]], ranges: list[Ranges], top: TopEigenvalue
) -> list[Link]:
    """The terms of a layer's Jacobian: those of the one before, carried through, and a new one."""
    if place == 0:
        return [Link(weight, 1.0)]
    lowest, highest, _, _ = ranges[-1]
    centre = (lowest + highest) / 2
    spread = (highest - lowest) / 2 * OUTWARD + UNIT * centre.abs()
    carried = [Link(weight * centre, link.factor, link) for link in chains[-1]]
    reach = _chain_norm(chains[-1], f"reach{place}", spread[None], top)[0]
    return [*carried, Link(weight * spread.sqrt(), reach * OUTWARD)]


def _chain_norm(links: list[Link], name: str, diagonal: Tensor, top: TopEigenvalue) -> Tensor:
    """The bound of a Jacobian's norm, its rows scaled by the roots of a diagonal."""
    squares = [top(f"{name}.{i}", link, diagonal) for i, link in enumerate(links)]
    # The root of 0 has no gradient; the constant is far below what rounding outward adds.
    roots = (square.clamp(min=1e-300).sqrt() for square in squares)
    norms = (link.factor * root for link, root in zip(links, roots, strict=True))
    return sum(norms, start=diagonal.new_zeros(len(diagonal))) * OUTWARD


def bend_depths(layers: Sequence[Layer], weights: Tensor, ranges: list[Ranges]) -> list[Tensor]:
    r"""The most each unit can bend a margin down, :math:`d = -\min F\sigma''`, of any sign.

    The interval of :math:`F_I` is carried backwards with its signs, :math:`F_{I-1} =
    W_I^T(\sigma' \odot F_I)`, and rounded outward by the error of the product.

    Args:
        layers: the network's layers.
        weights: ``(pairs, width)`` last-layer rows of the margins.
        ranges: of each hidden layer's slopes and bends, ``(width,)`` or ``(pairs, width)`` each.

    Returns:
        ``(pairs, width)`` a hidden layer.
    """
    low = high = weights
    depths = []
    for place in range(len(layers) - 2, -1, -1):
        least_slope, most_slope, least_bend, most_bend = ranges[place]
        lowest, _ = _product_interval(low, high, least_bend, most_bend)
        depths.append(-lowest + lowest.abs() * (OUTWARD - 1))
        if place:
            weight = layers[place].weight
            low, high = _product_interval(low, high, least_slope, most_slope)
            low, high = matrix_interval(low, high, weight)
    return depths[::-1]


def _product_interval(low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> Interval:
    """The range of a product of a factor in [low, high] and one in [lower, upper]."""
    ends = torch.stack([low * lower, low * upper, high * lower, high * upper])
    return ends.amin(0), ends.amax(0)


def proved(_: str, link: Link, diagonal: Tensor) -> Tensor:
    """The ``top`` of a proof: :func:`top_eigenvalue_bound`, with the link's error.

    Args:
        link: the term.
        diagonal: ``(pairs, width)`` rows.

    Returns:
        ``(pairs,)`` upper bounds.
    """
    bound = top_eigenvalue_bound(link.matrix, diagonal)
    if link.error == 0:
        return bound
    largest = diagonal.amax(1)
    return (bound.sqrt() + link.error * largest.sqrt()) ** 2 * OUTWARD


def local_curvature(
    rounding: RoundingModel,
    region: Region,
    item: Tensor,
    label: Tensor,
    target: Tensor,
    solve: str = "nothing",
) -> Tensor:
    r"""Proved bounds of :math:`|m|` over l2 balls around inputs, never above those over R^n.

    The intervals of :func:`crcbook.proof.intervals.preactivation_intervals` give the depths d of
    the bends. Let :math:`d^*` be those of the first layer if every layer above had its largest
    slope: then

    .. math:: \lambda_{\max}(W_1^T \mathrm{diag}(d) W_1) \le
       \lambda_{\max}(W_1^T \mathrm{diag}(d^*) W_1) + \tau(d - d^*), \qquad
       \tau(d) = \min\bigl(\max_j d_j^+ \|W_1\|^2, \sum_j d_j^+ \|w_j\|^2\bigr),

    whose first term belongs to the network alone, and a layer above adds at most
    :math:`\tau(d)` of its own weight times the square of the Lipschitz constant below it. That is
    tight where the layers above are nearly linear in the balls. The bound that solves ``"entries"``
    is the formula of this module with the balls' own ranges: a few eigenvalue problems for each
    entry. The one that solves ``"balls"`` has a few for each ball: the first layer is bounded as
    above, and the others by the deepest bends of all its entries.

    Args:
        rounding: the float64 network with its error bounds.
        region: the balls.
        item: ``(entries,)`` positions among them.
        label: ``(entries,)`` classes.
        target: ``(entries,)`` classes.
        solve: whose eigenvalue problems to solve as well: those of ``"nothing"``, of the
            ``"balls"`` or of the ``"entries"``.

    Returns:
        ``(entries,)`` float64, at least 0.
    """
    network = rounding.network
    bound = downward_curvature(network, label, target)
    depth = len(network.layers)
    # With one hidden layer, what needs no eigenvalue problem is what holds over R^n.
    if depth < 2 or not len(bound) or (depth == 2 and solve == "nothing"):
        return bound
    x, radius = region.x, region.radius
    intervals = preactivation_intervals(rounding, x, radius, region.allowed)
    if depth > 2:
        bound = torch.fmin(bound, _by_majorant(rounding, intervals, item, label, target))
    if solve != "nothing":
        for i in item.unique().tolist():
            rows = (item == i).nonzero().squeeze(1)
            weights = network.margin_weights(label[rows], target[rows])
            place = _Place.of(rounding, x, radius, intervals, i)
            if solve == "balls":
                found = _shared_sums(rounding, place, label[rows], target[rows])
            else:
                found = curvature_sum(network.layers, weights, proved, place.ranges)
            bound[rows] = torch.fmin(bound[rows], found)
    return bound


def _by_majorant(
    rounding: RoundingModel, intervals: list[Interval], item: Tensor, label: Tensor, target: Tensor
) -> Tensor:
    """The bound of :func:`local_curvature` that needs no eigenvalue problem an entry."""
    network = rounding.network
    ranges = activation_ranges(network, intervals)
    majorant, top = _majorants(network, label, target)
    bound = torch.empty_like(top)
    for part in torch.arange(len(item), device=item.device).split(_CHUNK_ENTRIES):
        rows = item[part]
        own = [(a[rows], b[rows], c[rows], d[rows]) for a, b, c, d in ranges]
        weights = network.margin_weights(label[part], target[part])
        first, *inner = bend_depths(network.layers, weights, own)
        total = top[part] + _most(rounding, 0, first - majorant[part])
        bound[part] = (total + upper_terms(rounding, inner, own)) * OUTWARD
    return bound


def _shared_sums(rounding: RoundingModel, place: "_Place", label: Tensor, target: Tensor) -> Tensor:
    """The bounds of a ball's entries by eigenvalue problems that all of them share."""
    network = rounding.network
    chains, ranges = jacobian_chains(network.layers[:-1], proved, place.ranges)
    weights = network.margin_weights(label, target)
    first, *inner = bend_depths(network.layers, weights, ranges)
    majorant, top = _majorants(network, label, target)
    total = top + _most(rounding, 0, first - majorant)
    for i, depths in enumerate(inner, start=1):
        deepest = depths.clamp(min=0).amax(0, keepdim=True)
        total = total + _chain_norm(chains[i], f"curve{i}", deepest, proved).square()
    return total * OUTWARD


def upper_terms(
    rounding: RoundingModel, depths: list[Tensor], ranges: list[Ranges]
) -> Tensor | float:
    r"""What the layers above the first add to a curvature: norms times Lipschitz constants.

    Args:
        rounding: the float64 network with its error bounds.
        depths: ``(pairs, width)`` depths d of the hidden layers above the first.
        ranges: of every hidden layer's slopes and bends, ``(pairs, width)`` each.

    Returns:
        ``(pairs,)``, at least 0; the number 0 where there are no such layers.
    """
    total, lipschitz = 0.0, 1.0
    for place, depth in enumerate(depths, start=1):
        least, most, _, _ = ranges[place - 1]
        slope = torch.maximum(least.abs(), most.abs()).amax(1)
        lipschitz = lipschitz * rounding.norms[place - 1] * slope * OUTWARD
        total = total + _most(rounding, place, depth) * lipschitz.square() * OUTWARD
    return total


def _most(rounding: RoundingModel, place: int, depth: Tensor) -> Tensor:
    """A bound of the largest eigenvalue of ``W.T diag(depth) W``, ``(pairs,)``."""
    depth, norm = depth.clamp(min=0), rounding.norms[place]
    weight = rounding.network.layers[place].weight
    terms = 1 + gamma(sum(weight.shape) + 4)
    squares = weight.square().sum(1) * terms
    return torch.minimum(depth.amax(1) * norm * norm, depth @ squares * terms) * OUTWARD


def _majorants(network: Network, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's depths with the largest slopes above it, and the eigenvalue bounds.

    ``(entries, width)`` and ``(entries,)``.
    """
    label, target, place = network.distinct_pairs(label, target)
    hidden = network.layers[:-1]
    ranges = [line_ranges(layer) for layer in hidden]
    ranges[1:] = [(most, most, low, high) for _, most, low, high in ranges[1:]]
    depths = bend_depths(network.layers, network.margin_weights(label, target), ranges)[0]
    pairs = list(zip(label.tolist(), target.tolist(), strict=True))
    known = _known_majorants(network)
    missing = [i for i, pair in enumerate(pairs) if pair not in known]
    if missing:
        bounds = top_eigenvalue_bound(hidden[0].weight, depths[missing])
        # Evaluated in another batch the depths may round otherwise: the proved ones are kept.
        for i, bound in zip(missing, bounds, strict=True):
            known[pairs[i]] = depths[i], bound
    depths, bounds = zip(*(known[pair] for pair in pairs), strict=True)
    return torch.stack(depths)[place], torch.stack(bounds)[place]


@remembered
def _known_majorants(network: Network) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """The depths and eigenvalue bounds of :func:`_majorants` so far."""
    return {}


@dataclass(frozen=True)
class _Place:
    """An input's ball: how far each preactivation can move in it, by the rows of Jacobians."""

    network: Network
    values: list[Tensor]
    errors: list[Tensor]
    radius: Tensor
    intervals: list[Interval]

    @classmethod
    def of(
        cls, rounding: RoundingModel, x: Tensor, radius: Tensor, intervals: list[Interval], i: int
    ) -> "_Place":
        values = [z[0] for z in rounding.network.preactivations(x[i : i + 1])]
        errors = [error[0] for error in rounding.preactivation_errors(x[i : i + 1].norm(dim=1))]
        own = [(low[i], high[i]) for low, high in intervals]
        return cls(rounding.network, values, errors, radius[i], own)

    def ranges(self, place: int, links: list[Link]) -> Ranges:
        """The ranges of a layer's slopes and bends."""
        z, (least, most) = self.values[place], self.intervals[place]
        rows = [link.factor * (link.matrix.norm(dim=1) + link.error) for link in links]
        reach = self.radius * sum(rows) * OUTWARD + self.errors[place]
        low, high = widened(z - reach, z + reach)
        return ranges_of(self.network.layers[place], low.maximum(least), high.minimum(most))
