r"""Certified l2 radii from bounded curvature.

Let f be the margin of the label over a target and :math:`k \ge 0` with
:math:`\nabla^2 f \succeq -kI`. At any point c, a second-order Taylor expansion bounds f from below
everywhere, and expanded again at the input :math:`x_0` it reads

.. math:: f(x_0 + \delta) \ge q - s \cdot \delta - \tfrac k2 \|\delta\|^2, \qquad
   q = f(c) + \nabla f(c) \cdot (x_0 - c) - \tfrac k2 \|x_0 - c\|^2, \quad
   s = -\nabla f(c) - k (c - x_0).

So in the ball of radius :math:`\rho` the margin is at least :math:`q - \rho\|s\| - k\rho^2/2`, and
positive while :math:`\rho` is below :math:`2q/(\|s\| + \sqrt{\|s\|^2 + 2kq})`. Any c is proof
enough; c = x_0 gives the closed form of Entesari et al. (2024), and the best c gives the convex
dual of Singla & Feizi (2020), Theorem 1 (radius) and Theorem 2 (fixed radius). A search chooses c;
nothing rests on whether it converged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from crcbook.attacks import boundary_points
from crcbook.checks import as_classes, as_inputs, as_radius
from crcbook.curvature import downward_curvature
from crcbook.networks import Network, read_network
from crcbook.rounding import OUTWARD, UNIT, RoundingModel, gamma

MAX_STEPS = 100
EXACT = 1e-6
_STALLED = 1e-9  # a smaller relative gain counts as none
_PATIENCE = 10  # steps without a gain
_SETTLED = 1e-5  # of the distance; what is left to gain is of the order of its square
_SHORTEST = 0.01
_CHUNK_VALUES = 2**19


@dataclass(frozen=True)
class Certificate:
    """Certified radii of a batch.

    Attributes:
        radius: ``(batch,)`` float64, l2, in the units of the input: no point closer than this is
            classified differently. 0 where the image is misclassified, infinity where no point at
            all can be.
        target: ``(batch,)`` int64, the class whose boundary limits the radius; the predicted class
            where the image is misclassified.
        exact: ``(batch,)`` bool: an adversarial point within ``(1 + 1e-6) * radius`` is known, so
            the radius is the distance to the boundary.
        nearest: ``(batch, n)`` float64, the closest adversarial point found; NaN where none was.
        targets: ``"all"``, or ``"runner-up"`` where only that class was considered.
    """

    radius: Tensor
    target: Tensor
    exact: Tensor
    nearest: Tensor
    targets: str


@dataclass(frozen=True)
class Verdict:
    """Whether the label is certain in a ball of a fixed radius.

    Attributes:
        robust: ``(batch,)`` bool: proved for every point of the ball. False is no proof of the
            opposite.
        margin: ``(batch,)`` float64 lower bound of the smallest margin in the ball.
        target: ``(batch,)`` int64, the class with that margin.
        targets: ``"all"``, or ``"runner-up"`` where only that class was considered.
    """

    robust: Tensor
    margin: Tensor
    target: Tensor
    targets: str


def certify(
    model: nn.Sequential, x: Tensor, y: Tensor, targets: str = "all", progress: bool = False
) -> Certificate:
    r"""Certified l2 radii: how far each input can move before its label can change.

    Proved for the network in real arithmetic with its stored weights; every evaluation is in
    float64 with its rounding error subtracted (see :mod:`crcbook.rounding`). The radius is the
    largest one found for each class, and the smallest of these over the classes.

    Args:
        model: a Sequential that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        targets: ``"all"`` other classes, or only the ``"runner-up"`` (the second largest logit),
            which is no guarantee against the others.
        progress: show a progress bar.

    Returns:
        The radii, in the units of the input, with the classes and points that limit them.

    Raises:
        TypeError: for a model or tensors of the wrong kind.
        ValueError: for a layer that cannot be certified, a wrong shape or range, NaN or infinity.
    """
    problem = _Problem.of(model, x, y, targets)
    parts = [problem.certify(chunk) for chunk in problem.chunks(progress, "certify")]
    return Certificate(*(torch.cat(column) for column in zip(*parts, strict=True)), targets)


def verify(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    radius: float,
    targets: str = "all",
    progress: bool = False,
) -> Verdict:
    """Decide whether each label is certain in the l2 ball of a given radius.

    The search for a class stops as soon as its margin is proved positive, so ``margin`` is a
    valid lower bound but not the best one.

    Args:
        model: a Sequential that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        radius: the l2 radius of the ball, in the units of the input.
        targets: ``"all"`` or ``"runner-up"``, as in :func:`certify`.
        progress: show a progress bar.

    Returns:
        The verdicts.

    Raises:
        TypeError: for a model or tensors of the wrong kind.
        ValueError: for a layer that cannot be certified, a wrong shape or range, NaN or infinity.
    """
    problem, radius = _Problem.of(model, x, y, targets), as_radius(radius)
    parts = [problem.verify(chunk, radius) for chunk in problem.chunks(progress, "verify")]
    margin, target = (torch.cat(column) for column in zip(*parts, strict=True))
    return Verdict(margin > 0, margin, target, targets)


@dataclass(frozen=True)
class _Pairs:
    """Margins to bound: one input, label and target each, with the curvature k."""

    x0: Tensor
    label: Tensor
    target: Tensor
    curvature: Tensor

    def take(self, index: Tensor) -> "_Pairs":
        return _Pairs(self.x0[index], self.label[index], self.target[index], self.curvature[index])


@dataclass(frozen=True)
class _Minorant:
    r"""The bound :math:`q - s\cdot\delta - k\|\delta\|^2/2`, with q down and ||s|| rounded up."""

    value: Tensor
    slope: Tensor
    direction: Tensor  # s itself: where the bound falls fastest
    curvature: Tensor

    def radius(self) -> Tensor:
        root = (self.slope**2 + 2 * self.curvature * self.value.clamp(min=0)).sqrt()
        radius = 2 * self.value / (self.slope + root) / OUTWARD
        return torch.where(self.value > 0, radius, 0.0)  # NaN fails the comparison: radius 0

    def margin(self, radius: float) -> Tensor:
        fall = radius * self.slope + self.curvature * radius**2 / 2
        margin = self.value - fall - (self.value.abs() + fall) * 8 * UNIT
        return torch.where(margin.isnan(), -torch.inf, margin)


@dataclass(frozen=True)
class _Problem:
    """A checked batch and the network it belongs to."""

    network: Network
    rounding: RoundingModel
    x: Tensor
    y: Tensor
    targets: str

    @classmethod
    def of(cls, model, x, y, targets: str) -> "_Problem":
        network = read_network(model)
        x = as_inputs(x, network)
        y = as_classes("y", y, network, batch=len(x))
        if targets not in ("all", "runner-up"):
            raise ValueError(f"targets must be 'all' or 'runner-up'; got {targets!r}")
        return cls(network, RoundingModel.of(network), x, y, targets)

    def chunks(self, progress: bool, description: str):
        size = max(1, _CHUNK_VALUES // max(layer.weight.shape[1] for layer in self.network.layers))
        starts = range(0, len(self.x), size)
        for start in tqdm(starts, desc=description, disable=not progress, unit="chunk"):
            yield slice(start, start + size)

    def certify(self, chunk: slice):
        x, y = self.x[chunk], self.y[chunk]
        order, correct = self._targets(x, y)
        radius = torch.zeros_like(x[:, 0])
        target = order[:, 0].clone()
        directions = torch.zeros_like(x)
        rows = correct.nonzero().squeeze(1)
        # The runner-up comes first and alone, so that "all" can only lower its radius.
        bound, direction = self._maximise(self._pairs(x, y, rows, order[rows, 0]))
        radius[rows], directions[rows] = bound, direction
        if self.targets == "all" and order.shape[1] > 1:
            image = rows.repeat_interleave(order.shape[1] - 1)
            other = order[rows, 1:].reshape(-1)
            bound, direction = self._maximise(self._pairs(x, y, image, other), limit=radius[image])
            bound, column = bound.reshape(len(rows), order.shape[1] - 1).min(dim=1)
            chosen = column + torch.arange(len(rows), device=x.device) * (order.shape[1] - 1)
            lower = bound < radius[rows]
            radius[rows[lower]], target[rows[lower]] = bound[lower], other[chosen[lower]]
            directions[rows[lower]] = direction[chosen[lower]]
        exact, nearest = self._nearest(x, y, target, radius, directions, correct)
        return radius, target, exact, nearest

    def verify(self, chunk: slice, radius: float):
        x, y = self.x[chunk], self.y[chunk]
        order, correct = self._targets(x, y)
        order = order if self.targets == "all" else order[:, :1]
        image = torch.arange(len(x), device=x.device).repeat_interleave(order.shape[1])
        pairs = self._pairs(x, y, image, order.reshape(-1))
        margin = self._maximise(pairs, radius=radius)[0].reshape(order.shape)
        worst, position = margin.min(dim=1)
        worst = torch.where(correct, worst, worst.clamp(max=0.0))
        return worst, order.gather(1, position[:, None]).squeeze(1)

    def _targets(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The other classes, largest logit first, and whether the label beats them all."""
        logits = self.network.logits(x)
        own = logits.gather(1, y[:, None])
        others = logits.scatter(1, y[:, None], -torch.inf).nan_to_num(nan=torch.inf)
        order = others.argsort(dim=1, descending=True, stable=True)
        order = order[order != y[:, None]].reshape(len(y), -1)
        return order, (own > others.gather(1, order[:, :1])).squeeze(1)

    def _pairs(self, x: Tensor, y: Tensor, image: Tensor, target: Tensor) -> _Pairs:
        label = y[image]
        return _Pairs(x[image], label, target, downward_curvature(self.network, label, target))

    def _maximise(self, pairs: _Pairs, limit: Tensor | None = None, radius: float | None = None):
        """Search for the minorants with the largest radius, or margin in the ball of ``radius``.

        A pair is left alone once it reaches its ``limit`` (its margin 0), an adversary is found in
        the ball, or its bound stalls.
        """
        floor = self._floor(pairs)
        best = torch.full_like(floor, -torch.inf)
        best[floor > 0] = torch.inf if radius is None else floor[floor > 0]
        if radius is not None:
            limit = torch.zeros_like(best)
        directions = torch.zeros_like(pairs.x0)
        active = (floor <= 0).nonzero().squeeze(1)
        state = _Search.start(pairs.take(active))
        for _ in range(MAX_STEPS):
            if not len(active):
                break
            margin, gradient = state.evaluate(self.network)
            minorant = self._minorant(state, margin, gradient)
            bound = minorant.radius() if radius is None else minorant.margin(radius)
            gain = bound - best[active]
            better = gain > 0
            best[active[better]] = bound[better]
            directions[active[better]] = minorant.direction[better]
            keep = state.advance(margin, gradient, gain > _STALLED * bound.abs(), radius)
            if limit is not None:
                keep &= ~(best[active] > limit[active])
            if radius is not None:
                keep &= ~(margin < 0)
            active, state = active[keep], state.take(keep)
        return best, directions

    def _floor(self, pairs: _Pairs) -> Tensor:
        """A lower bound of the margin over all of R^n, from the last activation's range."""
        weights, offset = self._last(pairs)
        if len(self.network.layers) == 1:
            return torch.where((weights == 0).all(1), offset, -torch.inf)
        low, high = self.network.layers[-2].activation.value_range
        lowest = torch.where(weights > 0, weights * low, weights * high)
        lowest = torch.where(weights == 0, 0.0, lowest)
        size = lowest.abs().sum(1) + 2 * offset.abs()
        floor = lowest.sum(1) + offset - gamma(weights.shape[1] + 8) * size
        return (floor - self.rounding.deviation(weights)).nan_to_num(nan=-torch.inf)

    def _last(self, pairs: _Pairs) -> tuple[Tensor, Tensor]:
        bias = self.network.layers[-1].bias
        return self.network.margin_weights(pairs.label, pairs.target), (
            bias[pairs.label] - bias[pairs.target]
        )

    def _errors(self, pairs: _Pairs, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, offset = self._last(pairs)
        value, slope = self.rounding.errors(point.norm(dim=1), weights, offset)
        return value, slope, self.rounding.deviation(weights)

    def _minorant(self, state: "_Search", margin: Tensor, gradient: Tensor) -> _Minorant:
        r"""The minorant of an evaluation, rounded to the safe side.

        The inner product, the squares and the three sums err by at most gamma of their lengths;
        the errors of f and of its gradient enter as :math:`e_f + e_g\|x_0 - c\|` and
        :math:`e_g`.
        """
        k, away = state.pairs.curvature, state.pairs.x0 - state.point
        value_error, slope_error, deviation = self._errors(state.pairs, state.point)
        distance, steepness = away.norm(dim=1), gradient.norm(dim=1)
        value = margin + (gradient * away).sum(1) - k / 2 * distance**2
        terms = gamma(away.shape[1] + 8)
        size = margin.abs() + steepness * distance + k * distance**2
        value = value - (value_error + slope_error * distance + terms * size + deviation) * OUTWARD
        direction = k[:, None] * away - gradient
        slope = direction.norm(dim=1)
        slope = slope + slope_error + terms * (slope + steepness + k * distance)
        return _Minorant(value, slope * OUTWARD, direction, k)

    def _nearest(self, x, y, target, radius, directions, correct) -> tuple[Tensor, Tensor]:
        """Overshoot the radius by a hair where the bound falls fastest: an adversary proves it."""
        nearest, exact = x.clone(), ~correct
        rows = correct.nonzero().squeeze(1)
        if not len(rows):
            return exact, nearest
        pairs = self._pairs(x, y, rows, target[rows])
        direction = torch.nn.functional.normalize(directions[rows], dim=1)
        reach = radius[rows] * (1 + 0.9 * EXACT)
        point = pairs.x0 + direction * reach[:, None].nan_to_num(posinf=0.0)
        hit = self._is_adversarial(pairs, point)
        missed = ~hit & radius[rows].isfinite()
        if missed.any():
            found = boundary_points(
                self.network, x[rows[missed]], y[rows[missed]], target[rows[missed]]
            )
            found = found + 0.5 * EXACT * (found - x[rows[missed]])  # across, beyond any doubt
            real = self._is_adversarial(pairs.take(missed), found)
            point[missed] = torch.where(real[:, None], found, torch.nan)
        point[radius[rows].isinf()] = torch.nan
        distance = (point - pairs.x0).norm(dim=1)
        nearest[rows], exact[rows] = point, hit | (distance <= radius[rows] * (1 + EXACT))
        return exact, nearest

    def _is_adversarial(self, pairs: _Pairs, point: Tensor) -> Tensor:
        margin, _ = self.network.margin_and_gradient(point, pairs.label, pairs.target)
        value_error, _, deviation = self._errors(pairs, point)
        return margin + value_error + deviation <= 0


@dataclass
class _Search:
    r"""Fixed-point steps :math:`c \leftarrow c + \alpha(x_0 - \eta \nabla f(c) - c)`.

    :math:`\eta` is the dual variable: for a radius it makes the linearised margin vanish, for a
    ball it puts the point on the sphere; never more than 1/k, where the dual ends. The step
    :math:`\alpha` is Barzilai and Borwein's: undamped, strongly curved margins would cycle.
    """

    pairs: _Pairs
    point: Tensor
    step: Tensor  # the last change of the point
    move: Tensor  # the last residual
    stalled: Tensor

    @classmethod
    def start(cls, pairs: _Pairs) -> "_Search":
        zeros = torch.zeros_like(pairs.x0)
        return cls(pairs, pairs.x0, zeros, zeros, torch.zeros_like(pairs.label))

    def evaluate(self, network: Network) -> tuple[Tensor, Tensor]:
        return network.margin_and_gradient(self.point, self.pairs.label, self.pairs.target)

    def advance(self, margin, gradient, improved, radius: float | None) -> Tensor:
        """Move the points; returns which searches are still worth a step."""
        away = self.pairs.x0 - self.point
        steepness = gradient.norm(dim=1)
        if radius is None:
            eta = (margin + (gradient * away).sum(1)) / steepness**2
        else:
            eta = radius / steepness
        eta = eta.clamp(min=0).minimum(1 / self.pairs.curvature)
        move = away - eta[:, None] * gradient
        change = self.move - move
        alpha = (self.step * change).sum(1) / change.square().sum(1)
        alpha = torch.where(alpha > 0, alpha, 1.0).clamp(_SHORTEST, 1.0)
        self.step, self.move = alpha[:, None] * move, move
        self.point = self.point + self.step
        self.stalled = torch.where(improved, 0, self.stalled + 1)
        settled = move.norm(dim=1) <= _SETTLED * away.norm(dim=1)
        return (self.stalled < _PATIENCE) & ~settled & move.isfinite().all(1)

    def take(self, keep: Tensor) -> "_Search":
        return _Search(
            self.pairs.take(keep),
            self.point[keep],
            self.step[keep],
            self.move[keep],
            self.stalled[keep],
        )
