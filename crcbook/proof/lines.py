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
is exact: :math:`z \pm \rho\|\mathrm{row}\|`. Where interval arithmetic on the last activations
alone gives more, that is taken: it does where units saturate.

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
|\beta| + |\Lambda'| S)` in effect, where :math:`S = |W|A + |b|` and A bounds the size of the
activations (of the inputs) that W meets in the ball. All of it is subtracted. For underflow,
every ball is wider by ``TINY_NORM`` in each coordinate, and every bound lower by ``TINY``.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from crcbook.activations import Activation
from crcbook.networks import Layer
from crcbook.proof.arithmetic import OUTWARD, TINY, TINY_NORM, UNIT, gamma
from crcbook.proof.prover import Prover
from crcbook.proof.sketches import Glance

_PIECES = 16  # of an interval, between the points of its grid
_CHUNK_VALUES = 2**21
_TOLERANCE = 1e-4  # of a radius
_STEPS = 60


def crown_margin(
    prover: Prover, x: Tensor, label: Tensor, target: Tensor, radius: float | Tensor
) -> Tensor:
    """Proved lower bounds of margins over l2 balls.

    Pairs of one input and radius share the work on the hidden layers where they follow each other.

    Args:
        prover: the float64 network with its error bounds.
        x: ``(pairs, n)`` float64 centres of the balls.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
        radius: the balls' l2 radius, at least 0, or ``(pairs,)`` radii.

    Returns:
        ``(pairs,)`` float64; minus infinity where something overflowed.
    """
    radius = torch.as_tensor(radius, dtype=x.dtype, device=x.device).expand(len(x))
    balls, item = torch.unique_consecutive(
        torch.cat([x, radius[:, None]], dim=1), dim=0, return_inverse=True
    )
    size = _chunk_size(prover)
    margin = torch.empty_like(radius)
    for start in range(0, len(balls), size):
        pairs = ((item >= start) & (item < start + size)).nonzero().squeeze(1)
        part = balls[start : start + size]
        margin[pairs] = _margins(
            prover, part[:, :-1], part[:, -1], label[pairs], target[pairs], item[pairs] - start
        )
    return margin


def crown_radius(
    prover: Prover, x: Tensor, label: Tensor, target: Tensor, limit: Tensor | None = None
) -> Tensor:
    """The largest radii at which :func:`crown_margin` was found to be positive.

    A bracket is narrowed to 1e-4 of its upper end by regula falsi; the radius is its lower end, the
    largest one proved. All pairs of an input that follow each other are tried at once, at the
    smallest radius that any of them asks for.

    Args:
        prover: the float64 network with its error bounds.
        x: ``(pairs, n)`` float64 inputs.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
        limit: ``(pairs,)`` radii that are good enough, tried first: a pair is left alone once its
            radius passes its limit. None for no limit.

    Returns:
        ``(pairs,)`` float64 l2 radii; 0 where the margin is not proved positive at the input,
        infinity where it is proved positive everywhere from the range of the last activation.
    """
    limit = torch.full_like(x[:, 0], torch.inf) if limit is None else limit
    inputs, item = torch.unique_consecutive(x, dim=0, return_inverse=True)
    size = _chunk_size(prover)
    radius = torch.empty_like(limit)
    for start in range(0, len(inputs), size):
        pairs = ((item >= start) & (item < start + size)).nonzero().squeeze(1)
        part = inputs[start : start + size]
        radius[pairs] = _radii(
            prover, part, label[pairs], target[pairs], item[pairs] - start, limit[pairs]
        )
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

    def take(self, index: Tensor) -> "Lines":
        """The lines at ``index``.

        Args:
            index: positions or a mask.

        Returns:
            The chosen lines.
        """
        return Lines(*(getattr(self, column.name)[index] for column in fields(self)))


def enclosing_lines(row: Activation, lower: Tensor, upper: Tensor) -> Lines:
    """Lines below and above an activation over intervals, proved as this module explains.

    Args:
        row: the activation.
        lower: left ends, float64, any shape.
        upper: right ends, the same shape.

    Returns:
        The lines, of that shape; NaN where an end is not finite.
    """
    points = _grid(row, lower, upper)
    low_bend, high_bend = row.bend_interval(points[:-1], points[1:])
    low_bend = low_bend - (OUTWARD - 1) * low_bend.abs()
    high_bend = high_bend + (OUTWARD - 1) * high_bend.abs()
    curve = _Curve(points, row.value(points), row.slope(points), low_bend, high_bend)
    middle, ends = lower + (upper - lower) / 2, row.slope_interval(lower, upper)
    at_middle, mirrored = (row.value(middle), row.slope(middle)), curve.mirrored()
    low_slope = curve.hull_slope(middle, *at_middle).clamp(*ends)
    high_slope = -mirrored.hull_slope(middle, *(-v for v in at_middle))
    high_slope = high_slope.clamp(*ends)
    size, zero = _size(row, lower, upper), torch.zeros_like(lower)
    below = [_down(curve.floor(slope), size) for slope in (low_slope, zero)]
    above = [-_down(mirrored.floor(-slope), size) for slope in (high_slope, zero)]
    return Lines(low_slope, below[0], high_slope, above[0], below[1], above[1])


def _down(offset: Tensor, size: Tensor) -> Tensor:
    """An offset less the bound of its rounding error."""
    return offset - 64 * UNIT * (size + offset.abs())


def _grid(row: Activation, lower: Tensor, upper: Tensor) -> Tensor:
    """Points from end to end, denser near 0 where the interval is wide; any would do."""
    scale = row.max_slope / row.max_bend if row.max_bend else 1.0
    share = torch.linspace(0, 1, _PIECES + 1, dtype=lower.dtype, device=lower.device)
    first, last = (lower / scale).asinh(), (upper / scale).asinh()
    warped = first + share.reshape(-1, *[1] * lower.dim()) * (last - first)
    points = (scale * warped.sinh()).clamp(lower, upper)
    points[0], points[-1] = lower, upper
    return points.cummax(dim=0).values


def _size(row: Activation, lower: Tensor, upper: Tensor) -> Tensor:
    """A bound of the activation's size over intervals."""
    at_zero = abs(float(row.value(lower.new_zeros(1))))
    return (row.max_slope * torch.maximum(lower.abs(), upper.abs()) + at_zero) * OUTWARD


@dataclass(frozen=True)
class _Curve:
    """A function on the points of a grid, ``(points, ...)``, and its bend's range between them."""

    points: Tensor
    value: Tensor
    slope: Tensor
    low_bend: Tensor
    high_bend: Tensor

    def mirrored(self) -> "_Curve":
        """The negative of the function."""
        return _Curve(self.points, -self.value, -self.slope, -self.high_bend, -self.low_bend)

    def hull_slope(self, middle: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """The slope of the convex hull at a point, given the function's value and slope there."""
        lowest, best = value, slope
        for i in range(len(self.points) - 1):
            left, right = self.points[i], self.points[i + 1 :]
            slope = (self.value[i + 1 :] - self.value[i]) / (right - left)
            height = self.value[i] + slope * (middle - left)
            height = torch.where((left < middle) & (middle < right), height, torch.inf)
            height, j = height.min(dim=0)
            better = height < lowest
            best = torch.where(better, slope.gather(0, j[None])[0], best)
            lowest = torch.where(better, height, lowest)
        return best

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
    vertex = torch.where(bend > 0, -slope / bend, 0.0).clamp(min=0).minimum(width)
    inside, end = (t * (slope + bend * t / 2) for t in (vertex, width))
    return torch.minimum(inside, end).clamp(max=0)


@dataclass(frozen=True)
class _Stage:
    """A hidden layer in the balls: the lines of its units, ``(balls, width)``."""

    layer: Layer
    lines: Lines
    size: Tensor  # bounds of the sums of magnitudes in z

    def pull(self, rows: Tensor, offset: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From a bound by this layer's activations to one by those before it."""
        lines = self.lines
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        offset_size = offset.abs() + _apply(
            rows.abs(), torch.maximum(lines.low_offset.abs(), lines.high_offset.abs())
        )
        offset = offset + _apply(positive, lines.low_offset) + _apply(negative, lines.high_offset)
        rows = positive * lines.low_slope[:, None] + negative * lines.high_slope[:, None]
        terms = gamma(2 * rows.shape[2] + 16)
        error = error + terms * (offset_size + _apply(rows.abs(), self.size))
        return rows @ self.layer.weight, offset + rows @ self.layer.bias, error


@dataclass(frozen=True)
class _Balls:
    """Balls, and what is known of the hidden layers in them.

    Attributes:
        x: ``(balls, n)`` centres.
        radius: ``(balls,)`` radii.
        low: ``(balls, width)`` lower bounds of the last layer's activations; at first the inputs'.
        high: ``(balls, width)`` upper bounds of them.
        stages: the hidden layers so far.
    """

    x: Tensor
    radius: Tensor
    low: Tensor
    high: Tensor
    stages: tuple[_Stage, ...] = ()

    @classmethod
    def of(cls, prover: Prover, x: Tensor, radius: Tensor) -> "_Balls":
        reach = radius[:, None] * OUTWARD + 2 * UNIT * x.abs() + TINY_NORM
        balls = cls(x, radius, x - reach, x + reach)
        for layer in prover.network.layers[:-1]:
            balls = balls.through(layer)
        return balls

    @property
    def size(self) -> Tensor:
        """``(balls, width)`` bounds of the size of the last layer's activations."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def through(self, layer: Layer) -> "_Balls":
        """The balls one hidden layer further."""
        lower = self.lowest(layer.weight[None], layer.bias[None])
        upper = -self.lowest(-layer.weight[None], -layer.bias[None])
        lines = enclosing_lines(layer.activation, lower, upper)
        size = (self.size @ layer.weight.abs().T + layer.bias.abs()) * OUTWARD
        stages = (*self.stages, _Stage(layer, lines, size))
        return _Balls(self.x, self.radius, lines.lowest, lines.highest, stages)

    def take(self, index: Tensor) -> "_Balls":
        """The balls at ``index``."""
        stages = (_Stage(s.layer, s.lines.take(index), s.size[index]) for s in self.stages)
        x, radius, low, high = (
            column[index] for column in (self.x, self.radius, self.low, self.high)
        )
        return _Balls(x, radius, low, high, tuple(stages))

    def lowest(self, rows: Tensor, offset: Tensor) -> Tensor:
        """Lower bounds of linear functions of the last layer's activations, in the balls.

        Args:
            rows: ``(1, functions, width)``, or ``(balls, functions, width)``.
            offset: ``(1, functions)``, or ``(balls, functions)``.

        Returns:
            ``(balls, functions)``.
        """
        widest = max([self.x.shape[1], *(len(stage.layer.bias) for stage in self.stages)])
        block = max(1, _CHUNK_VALUES // (len(self.x) * widest))
        parts = zip(rows.split(block, dim=1), offset.split(block, dim=1), strict=True)
        return torch.cat([self._lowest(*part) for part in parts], dim=1)

    def _lowest(self, rows: Tensor, offset: Tensor) -> Tensor:
        apart = self._lowest_apart(rows, offset)
        error = torch.zeros_like(offset)
        for stage in reversed(self.stages):
            rows, offset, error = stage.pull(rows, offset, error)
        fall = self.radius[:, None] * (rows.norm(dim=2) + TINY_NORM)
        size = offset.abs() + _apply(rows.abs(), self.x.abs()) + fall
        error = error + gamma(rows.shape[2] + 16) * size + TINY
        return torch.fmax(offset + _apply(rows, self.x) - fall - error * OUTWARD, apart)

    def _lowest_apart(self, rows: Tensor, offset: Tensor) -> Tensor:
        """The bound where each activation takes its worst value, whatever the others do."""
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        size = offset.abs() + _apply(rows.abs(), self.size)
        lowest = offset + _apply(positive, self.low) + _apply(negative, self.high)
        return lowest - gamma(2 * rows.shape[2] + 16) * OUTWARD * size - TINY


def _apply(rows: Tensor, vector: Tensor) -> Tensor:
    """``(balls, functions, width)`` rows times ``(balls, width)`` vectors."""
    if len(rows) == 1:
        return vector @ rows[0].T
    return (rows @ vector[:, :, None]).squeeze(2)


def _chunk_size(prover: Prover) -> int:
    """How many inputs to treat at once, so that memory is bounded."""
    widest = max(max(layer.weight.shape) for layer in prover.network.layers)
    return max(1, _CHUNK_VALUES // (widest * max(widest, 4 * _PIECES)))


def _margins(
    prover: Prover, x: Tensor, radius: Tensor, label: Tensor, target: Tensor, item: Tensor
) -> Tensor:
    """:func:`crown_margin` for a chunk: balls, and pairs that name their ball."""
    balls = _Balls.of(prover, x, radius).take(item)
    weights = prover.network.margin_weights(label, target)
    bias = prover.network.layers[-1].bias
    offset = bias[label] - bias[target]
    margin = balls.lowest(weights[:, None], offset[:, None]).squeeze(1)
    # The differences of the last layer's weights are rounded themselves.
    error = 4 * UNIT * ((weights.abs() * balls.size).sum(1) + offset.abs())
    # Away from the centre a reading is off by more.
    off = prover.rounding.reading_error(balls.x) + prover.rounding.reading[0] * balls.radius
    error = error + off
    margin = margin - (error + prover.rounding.deviation(weights)) * OUTWARD
    return torch.where(margin.isnan(), -torch.inf, margin - 4 * UNIT * margin.abs())


def _radii(
    prover: Prover, x: Tensor, label: Tensor, target: Tensor, item: Tensor, limit: Tensor
) -> Tensor:
    """:func:`crown_radius` for a chunk: inputs, and pairs that name their input."""
    clean = _margins(prover, x, torch.zeros_like(x[:, 0]), label, target, item)
    _, gradient = prover.network.margin_and_gradient(x[item], label, target)
    everywhere = (clean > 0) & (Glance.of(prover).lowest(label, target) > 0)
    bracket = _Bracket.start(clean, gradient.norm(dim=1), limit, everywhere)
    while (searched := bracket.unsettled(limit)).any():
        pairs = searched.nonzero().squeeze(1)
        rows, place = item[pairs].unique(return_inverse=True)
        radius = torch.full_like(x[rows, 0], torch.inf)
        radius = radius.scatter_reduce(0, place, bracket.trial[pairs], "amin")
        margin = _margins(prover, x[rows], radius, label[pairs], target[pairs], place)
        bracket.update(pairs, radius[place], margin)
    return torch.where(everywhere, torch.inf, bracket.low)


@dataclass
class _Bracket:
    """Radii proved and not proved, ``(pairs,)`` each, with margins there; where to try next."""

    clean: Tensor  # the margin at radius 0
    low: Tensor
    low_margin: Tensor
    high: Tensor
    high_margin: Tensor
    trial: Tensor
    steps: Tensor  # left to each pair

    @classmethod
    def start(cls, clean: Tensor, slope: Tensor, limit: Tensor, everywhere: Tensor) -> "_Bracket":
        trial = torch.where(limit.isfinite(), limit * OUTWARD, clean / slope)
        trial = torch.where((trial > 0) & trial.isfinite(), trial, 1.0)
        steps = torch.full_like(clean, _STEPS).masked_fill(~(clean > 0) | everywhere, 0)
        low, high = torch.zeros_like(clean), torch.full_like(clean, torch.inf)
        return cls(clean, low, clean.clone(), high, -high, trial, steps)

    def unsettled(self, limit: Tensor) -> Tensor:
        """Which pairs are worth another trial."""
        wide = self.high.isinf() | (self.high - self.low > _TOLERANCE * self.high)
        return wide & (self.low <= limit) & (self.steps > 0)

    def update(self, pairs: Tensor, radius: Tensor, margin: Tensor) -> None:
        """Learn from the margins of some pairs at some radii."""
        inside = (self.low[pairs] < radius) & (radius < self.high[pairs])
        raised, lowered = inside & (margin > 0), inside & ~(margin > 0)
        for chosen, end, value in [
            (raised, self.low, self.low_margin),
            (lowered, self.high, self.high_margin),
        ]:
            end[pairs[chosen]], value[pairs[chosen]] = radius[chosen], margin[chosen]
        self.steps[pairs] -= (radius == self.trial[pairs]).to(self.steps)
        # Aim a little across the root: from either side the next trial then closes the bracket.
        across = (raised.to(radius) - lowered.to(radius)) * _TOLERANCE / 4
        self.trial[pairs] = self._next(pairs, across)

    def _next(self, pairs: Tensor, across: Tensor) -> Tensor:
        """Inverse quadratic interpolation; bisection where that leaves the bracket, or stalls."""
        clean, steps, trial = self.clean[pairs], self.steps[pairs], self.trial[pairs]
        low, high = self.low[pairs], self.high[pairs]
        below, above = self.low_margin[pairs], self.high_margin[pairs]
        root = (low * above / (below - clean) - high * below / (above - clean)) * clean
        root = root / (below - above) * (1 + across)
        secant = (low * -above + high * below) / (below - above) * (1 + across)
        root = torch.where(low > 0, root, secant)
        usable = (root > low) & (root < high) & (steps % 4 > 0)
        root = torch.where(usable, root, (low + high) / 2)
        return torch.where(high.isinf(), torch.where(low < trial, trial, 2 * low), root)
