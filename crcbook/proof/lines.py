r"""CROWN for smooth activations: margins bounded by linear functions over l2 balls.

Zhang et al. (2018), "Efficient Neural Network Robustness Certification with General Activation
Functions". In a ball of radius :math:`\rho` around an input each preactivation stays in an interval
[l, u], where two lines enclose the activation,

.. math:: \alpha_l z + \beta_l \le \sigma(z) \le \alpha_u z + \beta_u, \qquad l \le z \le u.

A linear function :math:`\Lambda a^{(I)} + \kappa` of the activations is then at least
:math:`\Lambda' z^{(I)} + \kappa'` with :math:`\Lambda' = \Lambda^+\alpha_l + \Lambda^-\alpha_u` and
:math:`\kappa' = \kappa + \Lambda^+\beta_l + \Lambda^-\beta_u`, which is linear in
:math:`a^{(I-1)}`; at the input :math:`\Lambda x + \kappa` is at least :math:`\Lambda x_0 + \kappa -
\rho\|\Lambda\|`. The intervals come layer by layer from the same bound of each
:math:`\pm z^{(I)}_j`, the margin's bound from that of :math:`w a^{(L-1)}`. In the first layer this
is exact: :math:`z \pm \rho\|\mathrm{row}\|`. Products need go no further: with :math:`W_1 = RQ` and
orthonormal rows of Q, :math:`\|\Lambda W_1\| = \|\Lambda R\|`, and R is as wide as the layer. Where
interval arithmetic on the last activations alone gives more, that is taken: it does where units
saturate.

A bound need not fall as the ball grows, for the lines change with it; a radius is the largest one
found with a positive bound, which is proof enough.

**The lines.** One derivation serves every activation of the table. The slope
:math:`\alpha_l` is that of the convex hull of :math:`\sigma` on [l, u] at the midpoint, read off a
grid of points (of all lines below :math:`\sigma` this one leaves the smallest area: the tangent at
the midpoint where :math:`\sigma` is convex, the secant where it is concave, for an S the line
through an end that touches the other half). Any slope will do: only the offset
:math:`\beta_l \le \min_{[l,u]} \varphi`, :math:`\varphi(z) = \sigma(z) - \alpha_l z`, has to be
proved. Between neighbours p < q of the grid let :math:`b \le \sigma'' \le B`. Then, with Taylor's
theorem at p on the left half and at q on the right half, and with the error of linear
interpolation,

.. math:: \varphi(z) \ge \max\Bigl(\min_{0 \le t \le (q-p)/2} \min\bigl(\varphi(p) + \varphi'(p) t +
   \tfrac b2 t^2,\; \varphi(q) - \varphi'(q) t + \tfrac b2 t^2\bigr),\;
   \min(\varphi(p), \varphi(q)) - \tfrac{B^+}8 (q-p)^2\Bigr).

The first loses the third power of the grid's spacing, the second nothing where :math:`\sigma` is
concave: secants are recovered exactly, tangents all but exactly. The upper line is the lower one of
:math:`-\sigma`.

**Rounding.** With :math:`V = g\max(|l|,|u|) + |\sigma(0)|`, which bounds :math:`|\sigma|` on
[l, u], a computed offset :math:`\beta` errs by at most :math:`64u(V + |\beta|)`: 16uV for
:math:`\sigma`, 16uV for :math:`\sigma' t`, and a handful of operations; the quadratic terms are
rounded outward through b and B. Back through a layer of width N, :math:`\Lambda'`,
:math:`\Lambda'W` and :math:`\kappa'` err by at most :math:`\gamma_{2N+16}(|\kappa| + |\Lambda|
(|\beta| + |\alpha| S))` in effect, where :math:`S = |W|A + |b|` and A bounds the size of the
activations (of the inputs) that W meets in the ball. All of it is subtracted. For underflow,
every ball is wider by ``TINY_NORM`` in each coordinate, and every bound lower by ``TINY``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from crcbook.activations import IDENTITY, ROUNDING, Activation, value_at
from crcbook.bracket import Bracket
from crcbook.networks import Layer, Network, remembered
from crcbook.proof.arithmetic import OUTWARD, TINY, TINY_NORM, UNIT, gamma
from crcbook.proof.lipschitz import lipschitz_bound
from crcbook.proof.prover import Prover
from crcbook.proof.sketches import Glance

_PIECES = 16  # of an interval, between the points of its grid
# Between every second point inside, for curves whose hull may rest on two of these.
_CHORDS = tuple(torch.combinations(torch.arange(2, _PIECES, 2)).T.tolist())
_CHUNK_VALUES = 2**21
_CACHED_INTERVALS = 1500  # of units, whose grids take 200 kB an operand
_CACHED_VALUES = 2**17  # float64 values carried back at a time, 1 MB
_TOLERANCE = 1e-4  # of a radius
# Of the first trial: where the margin would vanish if it kept its slope. Where margins fall steeply
# a short first trial is right, and elsewhere what it costs is one trial.
_FIRST_SHARE = 0.05
# Where the slope is next to nothing that is far too long: at most so many times the radius of a
# Lipschitz constant, in networks of so few layers that this one is not next to nothing itself.
_FIRST_CONES, _SHALLOW = 10.0, 3


def crown_margin(
    prover: Prover,
    x: Tensor,
    label: Tensor,
    target: Tensor,
    radius: float | Tensor,
    kind: "Kind | None" = None,
) -> Tensor:
    """Proved lower bounds of margins over l2 balls.

    Pairs of one input and radius share the work on the hidden layers where they follow each other.

    Args:
        prover: the float64 network with its error bounds.
        x: ``(pairs, n)`` float64 centres of the balls.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
        radius: the balls' l2 radius, at least 0, or ``(pairs,)`` radii.
        kind: looks at the hidden layers in balls; None for ``Balls.of``, by lines alone.

    Returns:
        ``(pairs,)`` float64; minus infinity where something overflowed.
    """
    kind = kind or Balls.of
    radius = torch.as_tensor(radius, dtype=x.dtype, device=x.device).expand(len(x))
    balls, item = torch.unique_consecutive(
        torch.cat([x, radius[:, None]], dim=1), dim=0, return_inverse=True
    )
    size = _chunk_size(prover)
    margin = torch.empty_like(radius)
    for start in range(0, len(balls), size):
        pairs = ((item >= start) & (item < start + size)).nonzero().squeeze(1)
        part = balls[start : start + size]
        balls_of_part = kind(prover, part[:, :-1], part[:, -1])
        margin[pairs] = margins_in(
            prover, balls_of_part, label[pairs], target[pairs], item[pairs] - start
        )
    return margin


def crown_radius(
    prover: Prover,
    x: Tensor,
    label: Tensor,
    target: Tensor,
    limit: Tensor | None = None,
    search: "Search | None" = None,
) -> Tensor:
    """The largest radii at which :func:`crown_margin` was found to be positive.

    A bracket is narrowed by interpolation, until what it seems to leave is a small share of the
    radius, which is its lower end: the largest one proved. All pairs of an input that follow each
    other are tried at once, at the smallest radius that any of them asks for.

    Args:
        prover: the float64 network with its error bounds.
        x: ``(pairs, n)`` float64 inputs.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
        limit: ``(pairs,)`` radii that are good enough, tried first: a pair is left alone once its
            radius passes its limit. None for no limit.
        search: how to look for them; None for the defaults.

    Returns:
        ``(pairs,)`` float64 l2 radii; 0 where the margin is not proved positive at the input,
        infinity where it is proved positive everywhere from the range of the last activation.
    """
    limit = torch.full_like(x[:, 0], torch.inf) if limit is None else limit
    inputs, item = torch.unique_consecutive(x, dim=0, return_inverse=True)
    search = search or Search()
    known = torch.zeros_like(limit) if search.known is None else search.known.clamp(min=0)
    size = _chunk_size(prover)
    radius = torch.empty_like(limit)
    for start in range(0, len(inputs), size):
        pairs = ((item >= start) & (item < start + size)).nonzero().squeeze(1)
        of = label[pairs], target[pairs], item[pairs] - start
        between = known[pairs], limit[pairs]
        radius[pairs] = _radii(prover, inputs[start : start + size], of, between, search)
    return radius


@dataclass(frozen=True)
class Lines:
    r"""Two lines a unit that enclose its activation, :math:`\alpha z + \beta`.

    Attributes:
        low_slope: slopes of the lines below, any shape.
        low_offset: their values at 0.
        high_slope: slopes of the lines above.
        high_offset: their values at 0.
        lowest: lower bounds of the activation, which are lines of slope 0.
        highest: upper bounds of it.
    """

    low_slope: Tensor
    low_offset: Tensor
    high_slope: Tensor
    high_offset: Tensor
    lowest: Tensor
    highest: Tensor


def enclosing_lines(row: Activation, lower: Tensor, upper: Tensor) -> Lines:
    """Lines below and above an activation over intervals, proved as this module explains.

    Args:
        row: the activation.
        lower: left ends, float64, any shape.
        upper: right ends, the same shape.

    Returns:
        The lines, of that shape; NaN where an end is not finite.
    """
    groups = [*row.groups()]
    if len(groups) > 1:
        found = [enclosing_lines(own, lower[..., i], upper[..., i]) for own, i in groups]
        columns = zip(*(vars(lines).values() for lines in found), strict=True)
        return Lines(*(torch.cat(column, dim=-1) for column in columns))
    # On a processor so many at a time that all their grids stay in its cache.
    size = _CACHED_INTERVALS if lower.device.type == "cpu" else max(1, lower.numel())
    ends = zip(lower.flatten().split(size), upper.flatten().split(size), strict=True)
    columns = zip(*(_enclosing(row, *part) for part in ends), strict=True)
    return Lines(*(torch.cat(column).reshape(lower.shape) for column in columns))


def _enclosing(row: Activation, lower: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
    """The fields of the lines over intervals."""
    if row is IDENTITY:  # which is its own line
        none = 0 * (lower + upper)  # NaN where an end is not finite
        return 1 + none, none, 1 + none, none, lower + none, upper + none
    points = grid(row, lower, upper)
    curve = Curve(points, row.value(points), row.slope(points), *bends(row, points))
    middle, ends = lower + (upper - lower) / 2, row.slope_interval(lower, upper)
    tangent, at_middle = row.slope(middle), row.value(middle)
    turns = len(row.bend_extrema) - 1  # at most: between two of them the bend changes sign once
    hulls = curve.hull_slopes(middle, at_middle, tangent, inner=turns > 1)
    low_slope, high_slope = (slope.clamp(*ends) for slope in hulls)
    size = size_bound(row, lower, upper)
    below, above = (
        down(side.floor(slope), size)
        for side, slope in ((curve, low_slope), (curve.mirrored(), -high_slope))
    )
    lowest, highest = row.value_interval(lower, upper)
    finite = below.isfinite() & above.isfinite()
    lowest, highest = (end.where(finite, torch.nan) for end in (lowest, highest))
    return low_slope, below, high_slope, -above, lowest, highest


def down(offset: Tensor, size: Tensor) -> Tensor:
    """An offset less the bound of its rounding error."""
    return offset - 64 * UNIT * (size + offset.abs())


def grid(row: Activation, lower: Tensor, upper: Tensor, pieces: int = _PIECES) -> Tensor:
    """Points from end to end, denser near 0 where the interval is wide; any would do."""
    scale = row.max_slope / row.max_bend if row.max_bend else 1.0
    share = torch.linspace(0, 1, pieces + 1, dtype=lower.dtype, device=lower.device)
    first, last = (lower / scale).asinh(), (upper / scale).asinh()
    warped = first + share.reshape(-1, *[1] * lower.dim()) * (last - first)
    points = (scale * warped.sinh()).clamp(lower, upper)
    points[0], points[-1] = lower, upper
    return points.cummax(dim=0).values


def bends(row: Activation, points: Tensor) -> tuple[Tensor, Tensor]:
    """The range of the bend between neighbours of a grid, as ``row.bend_interval`` has it.

    The grid's own bends are evaluated once, and not as an end of two intervals each.
    """
    groups = [*row.groups()]
    if len(groups) > 1:
        ends = (bends(own, points[..., units]) for own, units in groups)
        first, second = (torch.cat(side, dim=-1) for side in zip(*ends, strict=True))
        return first, second
    bend, (least, most) = row.bend(points), row.bend_range
    low, high = torch.minimum(bend[:-1], bend[1:]), torch.maximum(bend[:-1], bend[1:])
    for point in row.bend_extrema:
        value = value_at(row.bend, point)
        inside = (points[:-1] <= point) & (point <= points[1:])
        low, high = (
            torch.where(inside, low.clamp(max=value), low),
            torch.where(inside, high.clamp(min=value), high),
        )
    margin = ROUNDING * row.max_bend
    low, high = (low - margin).clamp(min=least), (high + margin).clamp(max=most)
    return low - (OUTWARD - 1) * low.abs(), high + (OUTWARD - 1) * high.abs()


def size_bound(row: Activation, lower: Tensor, upper: Tensor) -> Tensor:
    """A bound of the activation's size over intervals."""
    return (row.max_slope * torch.maximum(lower.abs(), upper.abs()) + row.at_zero) * OUTWARD


@dataclass(frozen=True)
class Curve:
    """A function on the points of a grid, ``(points, ...)``, and its bend's range between them."""

    points: Tensor
    value: Tensor
    slope: Tensor
    low_bend: Tensor
    high_bend: Tensor

    def mirrored(self) -> "Curve":
        """The negative of the function."""
        return Curve(self.points, -self.value, -self.slope, -self.high_bend, -self.low_bend)

    def hull_slopes(
        self, middle: Tensor, value: Tensor, slope: Tensor, inner: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Slopes of the hulls at a point, given the function's value and slope there.

        Of the chords between the grid's points across the middle, those from an end of the interval
        are looked at, and between every second of the others.

        Args:
            middle: the point.
            value: of the function there.
            slope: of the function there.
            inner: whether to look at chords without an end; a function that turns from convex to
                concave or back once at most has none in its hulls.

        Returns:
            That of the convex hull, below the function, and that of the concave one.
        """
        first, last = self.points[0], self.points[-1]
        rise = (self.value - self.value[0]) / (self.points - first)
        drop = (self.value[-1] - self.value) / (last - self.points)
        left, right = self.points < middle, self.points > middle
        found = []
        for sign in (1, -1):
            # Of chords that share an end, the lowest at the middle is the one that rises least.
            chords = [
                (sign * torch.where(right, sign * rise, torch.inf).amin(dim=0), 0, first),
                (sign * torch.where(left, sign * drop, -torch.inf).amax(dim=0), -1, last),
            ]
            best, height = slope, sign * value
            for chord, end, point in chords:
                lower = sign * (self.value[end] + chord * (middle - point))
                better = lower < height
                best, height = torch.where(better, chord, best), torch.where(better, lower, height)
            if inner:
                best = self._inner_chords(middle, sign, best, height)
            found.append(best)
        return found[0], found[1]

    def _inner_chords(self, middle: Tensor, sign: int, best: Tensor, height: Tensor) -> Tensor:
        """The slope of an inner chord where it is lower, times the sign, than the best known."""
        begin, end = (self.points[list(places)] for places in _CHORDS)
        low, high = (self.value[list(places)] for places in _CHORDS)
        chord = (high - low) / (end - begin)
        across = (begin < middle) & (middle < end)
        lower = torch.where(across, sign * (low + chord * (middle - begin)), torch.inf)
        lowest, place = lower.min(dim=0)
        return torch.where(lowest < height, chord.gather(0, place[None])[0], best)

    def floor(self, line: Tensor) -> Tensor:
        """The module's bound of the function less a line of that slope through 0."""
        value, slope = self.value - line * self.points, self.slope - line
        width = (self.points[1:] - self.points[:-1]) * OUTWARD
        left = value[:-1] + _least(slope[:-1], self.low_bend, width / 2)
        right = value[1:] + _least(-slope[1:], self.low_bend, width / 2)
        chord = torch.minimum(value[:-1], value[1:])
        chord = chord - self.high_bend.clamp(min=0) * width.square() / 8
        return torch.maximum(torch.minimum(left, right), chord).amin(dim=0)


def _least(slope: Tensor, bend: Tensor, width: Tensor) -> Tensor:
    r"""The minimum of :math:`st + bt^2/2` over :math:`0 \le t \le` ``width``."""
    # Where it is convex at the vertex, or the end before it; elsewhere at one of the ends.
    vertex = (slope / bend).neg_().clamp_(min=0)
    place = torch.where(bend > 0, vertex, torch.inf).minimum(width)
    return torch.addcmul(slope, bend, place, value=0.5).mul_(place).clamp_(max=0)


@dataclass(frozen=True)
class _Stage:
    r"""A hidden layer in the balls: its relaxation, ready to be carried back.

    With mean m and half difference h of two lines, :math:`\Lambda^+ l + \Lambda^- u =
    \Lambda m + |\Lambda| h`.
    """

    layer: Layer
    slope: Tensor  # (balls, 1, width), m
    slope_spread: Tensor  # h
    offset: Tensor  # (balls, width, 1)
    sizes: Tensor  # (balls, width, 2): offsets' h, and what an entry of Lambda can err by

    @classmethod
    def of(cls, layer: Layer, lines: Lines, size: Tensor) -> "_Stage":
        """Prepare a layer whose sums have terms of at most these sizes."""
        steep = torch.maximum(lines.low_slope.abs(), lines.high_slope.abs())
        apart = torch.maximum(lines.low_offset.abs(), lines.high_offset.abs())
        terms = gamma(2 * max(layer.weight.shape) + 16)
        sizes = (lines.low_offset - lines.high_offset) / 2, terms * (apart + steep * size)
        return cls(
            layer,
            ((lines.low_slope + lines.high_slope) / 2)[:, None],
            ((lines.low_slope - lines.high_slope) / 2)[:, None],
            ((lines.low_offset + lines.high_offset) / 2)[:, :, None],
            torch.stack(sizes, dim=2),
        )

    def pull(self, rows: Tensor, offset: Tensor, balls: slice) -> tuple[Tensor, Tensor]:
        """From bounds by this layer's activations to bounds by its preactivations.

        The errors are subtracted from the offset.
        """
        size = rows.abs()
        spread = size @ self.sizes[balls]
        offset = offset - 8 * UNIT * offset.abs() + (rows @ self.offset[balls])[:, :, 0]
        rows = torch.addcmul(rows * self.slope[balls], size, self.slope_spread[balls])
        return rows, offset + spread[:, :, 0] - spread[:, :, 1] * OUTWARD


@dataclass(frozen=True)
class _Centre:
    """Where linear functions of the first preactivations, or of the inputs, are smallest.

    Attributes:
        point: ``(balls, width)`` those at the centres, as computed.
        error: ``(balls,)`` bounds of their error, in the l2 norm.
        size: ``(balls, width)`` bounds of their size in the balls.
        factor: of the Jacobian; None for the identity.
        radius: ``(balls,)`` radii.
    """

    point: Tensor
    error: Tensor
    size: Tensor
    factor: "Factor | None"
    radius: Tensor

    def lowest(self, rows: Tensor, offset: Tensor, balls: slice) -> Tensor:
        """``(balls, functions)`` lower bounds of ``rows @ point + offset`` in the balls."""
        terms, radius = gamma(2 * rows.shape[2] + 16), self.radius[balls, None]
        length = rows.norm(dim=2) * OUTWARD + TINY_NORM
        fall = length if self.factor is None else self.factor.norm(rows, length)
        fall = radius * (fall + TINY_NORM)
        inner = rows.abs() @ self.size[balls, :, None]
        error = terms * (offset.abs() + inner[:, :, 0] + fall) + length * self.error[balls, None]
        middle = (rows @ self.point[balls, :, None])[:, :, 0]
        return offset + middle - fall - error * OUTWARD - TINY


@dataclass(frozen=True)
class Factor:
    r"""A factor R of a weight :math:`W = RQ + E` whose rows are no longer than it has.

    :math:`\|\Lambda W\| \le \|\Lambda R\|\|Q\| + \|\Lambda\|\|E\|`: products
    with R, which is as wide as the layer, take the place of products with W.
    """

    matrix: Tensor
    stretch: float  # a bound of the norm of Q
    error: float  # a bound of the norm of E and of what rounding adds to a product with R

    @classmethod
    def of(cls, weight: Tensor) -> "Factor":
        """Factor a weight, and measure afterwards how well that went."""
        height, width = weight.shape
        if width <= height:
            rounding = gamma(height + 4) * float(weight.norm()) * OUTWARD
            return cls(weight, 1.0, rounding)
        q, r = torch.linalg.qr(weight.T)
        matrix, rows = r.T.contiguous(), q.T
        terms, sizes = gamma(width + height + 8), (float(matrix.norm()), float(rows.norm()))
        gram = rows @ q - torch.eye(height, dtype=q.dtype, device=q.device)
        stretch = 1 + (float(gram.norm()) + terms * sizes[1] ** 2) * OUTWARD
        left = float((weight - matrix @ rows).norm()) + terms * (
            sizes[0] * sizes[1] + float(weight.norm())
        )
        return cls(matrix, stretch, (left + gamma(height + 4) * sizes[0] * stretch) * OUTWARD)

    def norm(self, rows: Tensor, length: Tensor) -> Tensor:
        """Bounds of ``(rows @ weight).norm(dim=2)``; ``length`` bounds the rows' own norms."""
        product = (rows @ self.matrix).norm(dim=2) * OUTWARD
        return product * self.stretch + length * self.error


@remembered
def _first_factor(network: Network) -> Factor:
    return Factor.of(network.layers[0].weight)


@dataclass(frozen=True)
class Balls:
    """Balls, and what is known of the hidden layers in them.

    Attributes:
        x: ``(balls, n)`` centres.
        centre: what linear functions end at.
        low: ``(balls, width)`` lower bounds of the last layer's activations; at first the inputs'.
        high: ``(balls, width)`` upper bounds of them.
        stages: the hidden layers so far.
        first: ``(balls, width)`` ends of the first layer's preactivations; None if there is none.
    """

    x: Tensor
    centre: _Centre
    low: Tensor
    high: Tensor
    stages: tuple[_Stage, ...] = ()
    first: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, prover: Prover, x: Tensor, radius: Tensor, **more: Any) -> Self:
        """Look at all hidden layers in balls.

        Args:
            prover: the float64 network with its error bounds.
            x: ``(balls, n)`` centres.
            radius: ``(balls,)`` radii.
            **more: attributes of a subclass.

        Returns:
            The balls, with all the hidden layers.
        """
        reach = radius[:, None] * OUTWARD + 2 * UNIT * x.abs() + TINY_NORM
        low, high = x - reach, x + reach
        first, *rest = prover.network.layers
        if not rest:
            size = torch.maximum(low.abs(), high.abs())
            centre = _Centre(x, torch.zeros_like(radius), size, None, radius)
            return cls(x, centre, low, high, **more)
        z, error = prover.network.first(x), prover.rounding.first_error(x)
        size = torch.maximum(low.abs(), high.abs()) @ first.weight.abs().T + first.bias.abs()
        size = size * OUTWARD
        centre = _Centre(z, error, size, _first_factor(prover.network), radius)
        norms = first.weight.norm(dim=1) * OUTWARD + TINY_NORM
        reach = radius[:, None] * norms + error[:, None] + 4 * UNIT * size + TINY
        ends = z - reach * OUTWARD, z + reach * OUTWARD
        balls = cls(x, centre, low, high, first=ends, **more)._with(first, *ends)
        for layer in rest[:-1]:
            balls = balls._with(layer, *balls.ends(layer))
        return balls

    def ends(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Where the preactivations of the next layer stay.

        Args:
            layer: that layer.

        Returns:
            ``(balls, width)`` lower and upper ends.
        """
        ends = torch.cat([layer.weight, -layer.weight]), torch.cat([layer.bias, -layer.bias])
        lower, upper = self.by_lines(*(part[None] for part in ends)).chunk(2, dim=1)
        return lower, -upper

    @property
    def size(self) -> Tensor:
        """``(balls, width)`` bounds of the size of the last layer's activations."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def _with(self, layer: Layer, lower: Tensor, upper: Tensor) -> Self:
        """One hidden layer more, whose preactivations are in these intervals."""
        lines = enclosing_lines(layer.activation, lower, upper)
        size = (self.size @ layer.weight.abs().T + layer.bias.abs()) * OUTWARD
        stages = (*self.stages, _Stage.of(layer, lines, size))
        return replace(self, low=lines.lowest, high=lines.highest, stages=stages)

    def lowest(self, rows: Tensor, offset: Tensor) -> Tensor:
        """Lower bounds of linear functions of the last layer's activations, in the balls.

        Args:
            rows: ``(balls, functions, width)``.
            offset: ``(balls, functions)``.

        Returns:
            ``(balls, functions)``.
        """
        return self.by_lines(rows, offset)

    def by_lines(self, rows: Tensor, offset: Tensor) -> Tensor:
        """The same by lines through all layers.

        Args:
            rows: ``(1, functions, width)``, or ``(balls, functions, width)``.
            offset: ``(1, functions)``, or ``(balls, functions)``.

        Returns:
            ``(balls, functions)``.
        """
        widest = max([rows.shape[2], *(stage.layer.weight.shape[1] for stage in self.stages[1:])])
        count = max(1, _CACHED_VALUES // widest)  # of functions, of all balls together
        size = max(1, count // rows.shape[1])
        found = torch.empty(len(self.x), rows.shape[1], dtype=self.x.dtype, device=self.x.device)
        for start in range(0, len(self.x), size):
            balls = slice(start, start + size)
            own = (rows, offset) if len(rows) == 1 else (rows[balls], offset[balls])
            for first in range(0, rows.shape[1], count):
                some = slice(first, first + count)
                found[balls, some] = self._lowest(own[0][:, some], own[1][:, some], balls)
        return torch.fmax(found, self._lowest_apart(rows, offset))

    def _lowest(self, rows: Tensor, offset: Tensor, balls: slice) -> Tensor:
        rows, offset = self.to_first(rows, offset, balls)
        if self.stages:
            rows, offset = self.stages[0].pull(rows, offset, balls)
        return self.centre.lowest(rows, offset, balls)

    def to_first(self, rows: Tensor, offset: Tensor, balls: slice) -> tuple[Tensor, Tensor]:
        """From bounds by the last layer's activations to bounds by the first layer's.

        Args:
            rows: ``(1, functions, width)``, or ``(balls, functions, width)``.
            offset: ``(1, functions)``, or ``(balls, functions)``.
            balls: which ones the functions are asked about.

        Returns:
            The rows and offsets of linear functions that are nowhere larger in the balls.
        """
        for stage in reversed(self.stages[1:]):
            rows, offset = stage.pull(rows, offset, balls)
            offset = offset + rows @ stage.layer.bias
            rows = rows @ stage.layer.weight
        return rows, offset

    def _lowest_apart(self, rows: Tensor, offset: Tensor) -> Tensor:
        """The bound where each activation takes its worst value, whatever the others do."""
        middle, reach = (self.low + self.high) / 2, (self.high - self.low) / 2
        size = offset.abs() + _apply(rows.abs(), self.size)
        lowest = offset + _apply(rows, middle) - _apply(rows.abs(), reach)
        return lowest - gamma(2 * rows.shape[2] + 16) * OUTWARD * size - TINY


def _apply(rows: Tensor, vector: Tensor) -> Tensor:
    """``(balls, functions, width)`` rows times ``(balls, width)`` vectors."""
    if len(rows) == 1:
        return vector @ rows[0].T
    return (rows @ vector[:, :, None]).squeeze(2)


def _chunk_size(prover: Prover) -> int:
    """How many inputs to treat at once, so that memory is bounded."""
    widest = max(max(layer.weight.shape) for layer in prover.network.layers)
    return max(1, _CHUNK_VALUES // (widest * 4 * _PIECES))


def margins_in(prover: Prover, balls: Balls, label: Tensor, target: Tensor, item: Tensor) -> Tensor:
    """:func:`crown_margin` for balls that were looked at, and pairs that name their ball."""
    x, radius = balls.x, balls.centre.radius
    weights = prover.network.margin_weights(label, target)
    bias = prover.network.layers[-1].bias
    offset = bias[label] - bias[target]
    # The pairs of a ball, one after another, and zeros where it has fewer than another ball.
    order = item.argsort(stable=True)
    count = item.bincount(minlength=len(x))
    rank = torch.empty_like(item)
    rank[order] = torch.arange(len(item), device=x.device) - (count.cumsum(0) - count)[item[order]]
    rows = weights.new_zeros(len(x), int(count.max()), weights.shape[1])
    rows[item, rank] = weights
    offsets = rows[:, :, 0].clone()
    offsets[item, rank] = offset
    margin = balls.lowest(rows, offsets)[item, rank]
    # The differences of the last layer's weights are rounded themselves.
    error = 4 * UNIT * ((weights.abs() * balls.size[item]).sum(1) + offset.abs())
    # Away from the centre the gap is wider.
    off = prover.rounding.gap_at(x) + prover.rounding.gap[0] * radius
    error = error + off[item]
    margin = margin - (error + prover.rounding.deviation(weights)) * OUTWARD
    return torch.where(margin.isnan(), -torch.inf, margin - 4 * UNIT * margin.abs())


def _radii(
    prover: Prover,
    x: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor],
    between: tuple[Tensor, Tensor],
    search: "Search",
) -> Tensor:
    """:func:`crown_radius` for a chunk: inputs, and classes with the input each belongs to."""
    label, target, item = pairs
    margin, gradient = prover.network.margin_and_gradient(x[item], label, target)
    error = prover.margin_error(label, target, x[item])
    clean = torch.where(margin.isfinite(), margin - error, -torch.inf)
    everywhere = (clean > 0) & (Glance.of(prover).lowest(label, target) > 0)
    asked = (clean > 0) & ~everywhere
    group = item if search.smallest else torch.arange(len(item), device=x.device)
    count = len(x) if search.smallest else len(item)

    def least(values: Tensor, rows: Tensor) -> Tensor:
        found = values.new_full((count,), torch.inf)
        return found.scatter_reduce(0, group[rows], values[rows], "amin")

    every = asked.nonzero().squeeze(1)
    margin = least(clean, every)
    slope = margin / least(clean / gradient.norm(dim=1), every)
    known, limit = (least(ends, every) for ends in between)
    first = _FIRST_SHARE * margin / slope
    if len(prover.network.layers) <= _SHALLOW:
        first = first.fmin(
            _FIRST_CONES * least(clean / lipschitz_bound(prover, label, target), every)
        )
    bracket = Bracket.start(margin, slope, limit, known, first, search.tolerance)
    found = torch.zeros_like(clean)
    while (searched := (bracket.unsettled[group] & asked)).any():
        few = searched.nonzero().squeeze(1)
        rows, place = item[few].unique(return_inverse=True)
        radius = torch.full_like(x[rows, 0], torch.inf)
        radius = radius.scatter_reduce(0, place, bracket.trial[group[few]], "amin")
        margin, tried = torch.full_like(clean, torch.inf), torch.zeros_like(clean)
        balls = search.kind(prover, x[rows], radius)
        margin[few] = margins_in(prover, balls, label[few], target[few], place)
        tried[few] = radius[place]
        found = torch.where(margin.isfinite() & (margin > 0), found.maximum(tried), found)
        bracket.update(group[few].unique(), least(tried, few), least(margin, few))
    return torch.where(everywhere, torch.inf, found)


Kind = Callable[[Prover, Tensor, Tensor], Balls]


@dataclass(frozen=True)
class Search:
    """How to look for the largest radii at which margins are proved.

    Attributes:
        kind: looks at the hidden layers in balls.
        smallest: whether only the smallest radius of an input counts: one search an input then.
        tolerance: of a radius, what may be left.
        known: ``(pairs,)`` radii that are proved otherwise: nothing smaller is tried before the
            first failure. None for no such radii.
    """

    kind: Kind = Balls.of
    smallest: bool = False
    tolerance: float = _TOLERANCE
    known: Tensor | None = None
