r"""Training objectives: the attacks, the bounds and the estimates that a step's loss is made of.

Curvature-based robust training (CRT; Singla & Feizi 2020, section 6) takes the cross-entropy at
attacked points and adds the curvature of the margins. Its rivals train the worst margins that a
bound leaves possible in the l2 ball :math:`\|x - x_0\| \le \rho`: with lower bounds
:math:`\underline f_t` of the margins :math:`f_t = z_y - z_t`, the loss is

.. math:: \mathrm{CE}\bigl((-\underline f_1, \dots, -\underline f_k), y\bigr)
   = \log\Bigl(1 + \sum_{t \ne y} e^{-\underline f_t}\Bigr).

Everything here is evaluated in the precision of training, rounding to nearest, and follows norms by
power iteration: good enough to train with and never certified with.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from crcbook.activations import IDENTITY
from crcbook.networks import Layer, Network, submodules
from crcbook.networks.modules import activation_of
from crcbook.power_iteration import top_eigenvalue_estimate
from crcbook.proof.curvature import Link, RangesOf, curvature_sum
from crcbook.proof.intervals import Interval, Ranges, line_ranges


def trained_layers(model: nn.Sequential, dtype: torch.dtype | None = None) -> list[Layer]:
    """The layers with the weights being trained.

    Args:
        model: a Sequential that :func:`crcbook.networks.read_network` accepts.
        dtype: for copies of the weights in this precision, without gradients; None for the
            weights themselves.

    Returns:
        A layer a linear map.
    """
    layers: list[Layer] = []
    for module in submodules(model):
        if isinstance(module, nn.Linear):
            zeros = module.weight.new_zeros(len(module.weight))
            bias = zeros if module.bias is None else module.bias
            layers.append(Layer(module.weight, bias, IDENTITY))
        elif (row := activation_of(module)) and row is not IDENTITY:
            layers[-1] = replace(layers[-1], activation=row)
    if dtype is None:
        return layers
    return [
        Layer(layer.weight.detach().to(dtype), layer.bias.detach().to(dtype), layer.activation)
        for layer in layers
    ]


def generalised_cross_entropy(logits: Tensor, y: Tensor, q: float) -> Tensor:
    r"""The mean of :math:`(1 - p_y^q)/q` over a batch (Zhang & Sabuncu 2018).

    Args:
        logits: ``(batch, classes)``.
        y: ``(batch,)`` labels.
        q: from 0, the cross-entropy, to 1, one minus the probability.

    Returns:
        A scalar.
    """
    entropy = cross_entropy(logits, y, reduction="none")
    return entropy.mean() if q == 0 else (-torch.expm1(-q * entropy) / q).mean()


def worst_points(
    layers: Sequence[Layer], x: Tensor, y: Tensor, radius: float, steps: int, box: bool = False
) -> Tensor:
    """Attack all classes at once: projected gradient ascent on the cross-entropy in an l2 ball.

    Args:
        layers: those of :func:`trained_layers`, in the precision of the gradients.
        x: ``(batch, n)``.
        y: ``(batch,)`` labels.
        radius: the l2 radius of the ball.
        steps: the number of gradients.
        box: whether every point stays between 0 and 1, as the inputs do.

    Returns:
        ``(batch, n)`` points of the ball.
    """
    delta, dtype = torch.zeros_like(x), layers[0].weight.dtype
    for _ in range(steps):
        gradient = _loss_gradient(layers, (x + delta).to(dtype), y).to(x.dtype)
        if box:  # what the walls would stop takes no part in a step
            stopped = ((x + delta <= 0) & (gradient < 0)) | ((x + delta >= 1) & (gradient > 0))
            gradient = gradient.masked_fill(stopped, 0.0)
        way = normalize(gradient, dim=1, eps=torch.finfo(x.dtype).tiny)
        delta = delta + 2.5 * radius / steps * way
        if box:
            delta = (x + delta).clamp(0, 1) - x
        delta = delta * (radius / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    return x + delta


def _loss_gradient(layers: Sequence[Layer], x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the cross-entropy in x, by hand: several times faster than autograd."""
    network, last = Network(tuple(layers)), layers[-1]
    active, slopes = network.forward(network.first(x))
    wrong = torch.addmm(last.bias, active, last.weight.T).softmax(1)
    wrong[torch.arange(len(y), device=y.device), y] -= 1
    gradient = network.backward(wrong @ last.weight, slopes)
    return gradient @ layers[0].weight if slopes else gradient


def runner_up(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The class other than the label with the largest logit.

    Args:
        model: a classifier, or its logits as a function.
        x: ``(batch, n)``.
        y: ``(batch,)`` labels.

    Returns:
        ``(batch,)`` classes.
    """
    with torch.no_grad():
        return model(x).scatter(1, y[:, None], -torch.inf).argmax(1)


def runner_up_points(
    layers: Sequence[Layer],
    x: Tensor,
    pair: tuple[Tensor, Tensor],
    radius: float,
    curvature: Tensor,
    steps: int,
) -> Tensor:
    r"""The attack of the published CRT (Singla & Feizi 2020, section 6): one margin, its dual.

    The inner problem of :math:`\max_{\eta \ge |m|} \min_x f(x) + \frac\eta2(\|x-x_0\|^2-\rho^2)`
    is solved by the fixed point

    .. math:: x \leftarrow x_0 - \nabla f(x)/\eta, \qquad
       \eta = \max(\|\nabla f(x)\|/\rho,\, |m|),

    which holds :math:`\eta` at the value that its own solution asks for. The authors' release
    bisects :math:`\eta` instead, 30 times with 10 such steps each.

    Args:
        layers: those of :func:`trained_layers`, in the precision of the gradients.
        x: ``(batch, n)``.
        pair: ``(batch,)`` labels, and the classes to reach.
        radius: the l2 radius of the ball.
        curvature: ``(batch,)`` values of :math:`|m|` for these margins.
        steps: the number of gradients.

    Returns:
        ``(batch, n)`` points of the ball.
    """
    network, point = Network(tuple(layers)), x
    for _ in range(steps):
        _, gradient = network.margin_and_gradient(point.to(network.dtype), *pair)
        gradient = gradient.to(x.dtype)
        eta = torch.maximum(gradient.norm(dim=1) / radius, curvature).clamp(min=1e-30)
        point = x - gradient / eta[:, None]
    return point


def ibp_margins(layers: Sequence[Layer], x: Tensor, y: Tensor, radius: float) -> Tensor:
    r"""Margins' lower bounds in an l2 ball by interval bound propagation (Gowal et al. 2018).

    A linear function with coefficients w moves by at most :math:`\rho\|w\|` in the ball, which
    gives the intervals of the first layer, and by at most :math:`|w| \cdot r` where each of its
    arguments stays within :math:`c \pm r`. A monotone activation maps ends to ends. The last layer
    is bounded by the differences of its rows, a margin each ("elision of the last layer"). The
    paper has boxes in place of the l2 ball, and mixes in the cross-entropy at the input.

    Args:
        layers: of a network with monotone activations.
        x: ``(batch, n)`` centres.
        y: ``(batch,)`` labels.
        radius: the l2 radius of the ball.

    Returns:
        ``(batch, classes)``, differentiable; 0 at the label.

    Raises:
        ValueError: for an activation that is not monotone.
    """
    return _interval_margins(layers, x, y, radius, _intervals(layers, x, radius))


def _intervals(layers: Sequence[Layer], x: Tensor, radius: float) -> list[tuple[Tensor, Tensor]]:
    """The ends of each hidden layer's preactivations in the balls."""
    intervals: list[Interval] = []
    for place, layer in enumerate(layers[:-1]):
        if layer.activation.slope_range[0] < 0:
            raise ValueError(
                f"interval bounds need monotone activations; got {layer.activation.name}"
            )
        centre, reach = _activations(layers[:place], x, intervals)
        z = torch.addmm(layer.bias, centre, layer.weight.T)
        move = _most_moved(layer.weight, radius, reach)
        intervals.append((z - move, z + move))
    return intervals


def _activations(
    layers: Sequence[Layer], x: Tensor, intervals: list[Interval]
) -> tuple[Tensor, Tensor | None]:
    """The centre and the reach of the last layer's activations; at first x and the ball."""
    if not layers:
        return x, None
    low, high = map(layers[-1].activation.value, intervals[-1])
    return (low + high) / 2, (high - low) / 2


def _most_moved(rows: Tensor, radius: float, reach: Tensor | None) -> Tensor:
    """How far linear functions can move, ``(functions,)`` in a ball or ``(batch, functions)``."""
    return radius * rows.norm(dim=1) if reach is None else reach @ rows.abs().T


def _interval_margins(
    layers: Sequence[Layer], x: Tensor, y: Tensor, radius: float, intervals: list[Interval]
) -> Tensor:
    weight, bias = layers[-1].weight, layers[-1].bias
    centre, reach = _activations(layers[:-1], x, intervals)
    between = (weight[:, None] - weight).flatten(0, 1)
    fall = _most_moved(between, radius, reach).expand(len(x), -1)
    fall = fall.unflatten(1, (len(weight), -1))[torch.arange(len(y), device=y.device), y]
    return clean_margins(torch.addmm(bias, centre, weight.T), y) - fall


def clean_margins(logits: Tensor, y: Tensor) -> Tensor:
    """The label's logit less each of the others.

    Args:
        logits: ``(batch, classes)``.
        y: ``(batch,)`` labels.

    Returns:
        ``(batch, classes)``; 0 at the label.
    """
    return logits.gather(1, y[:, None]) - logits


def crown_ibp_margins(layers: Sequence[Layer], x: Tensor, y: Tensor, radius: float) -> Tensor:
    r"""Margins' lower bounds by CROWN-IBP: interval bounds, then one linear bound backwards.

    Zhang et al. (2020), "Towards Stable and Efficient Training of Verifiably Robust Neural
    Networks". On an interval [l, u] of a unit, and with :math:`\lambda = \min(\sigma'(l),
    \sigma'(u))`,

    .. math:: \sigma(l) + \lambda(z - l) \;\le\; \sigma(z) \;\le\; \sigma(u) + \lambda(z - u).

    Proof: where :math:`\sigma'` is monotone, or rises and then falls, its minimum over [l, u] is at
    an end, so :math:`\sigma' \ge \lambda` there; integrate from l to z, and from z to u. Both lines
    have one slope: a linear function :math:`\Lambda a + \kappa` of the activations falls to
    :math:`\Lambda' z + \kappa'`, :math:`\Lambda' = \Lambda\,\mathrm{diag}(\lambda)`, whatever its
    signs, and in the input the margin is at least :math:`\Lambda x_0 + \kappa - \rho\|\Lambda\|`.
    The paper fades from this bound to the intervals' while it trains; here each margin takes the
    larger of the two. Its rows are those of a gradient for every class: a step costs about twice
    that of CRT.

    Args:
        layers: of a network with monotone activations, as every one of the table whose slope is
            nowhere negative.
        x: ``(batch, n)`` centres.
        y: ``(batch,)`` labels.
        radius: the l2 radius of the ball.

    Returns:
        ``(batch, classes)``, differentiable, nowhere below :func:`ibp_margins`; 0 at the label.

    Raises:
        ValueError: for an activation that is not monotone.
    """
    intervals = _intervals(layers, x, radius)
    weight, bias = layers[-1].weight, layers[-1].bias
    rows, offset = weight[y][:, None] - weight, bias[y][:, None] - bias
    for layer, ends in zip(layers[-2::-1], reversed(intervals), strict=True):
        slope = torch.minimum(*map(layer.activation.slope, ends))
        below, above = (layer.activation.value(end) - slope * end for end in ends)
        offset = (
            offset + _apply(rows, (below + above) / 2) - _apply(rows.abs(), (above - below) / 2)
        )
        rows = rows * slope[:, None]
        offset = offset + rows @ layer.bias
        rows = rows @ layer.weight
    margins = offset + _apply(rows, x) - radius * rows.norm(dim=2)
    return torch.maximum(margins, _interval_margins(layers, x, y, radius, intervals))


def _apply(rows: Tensor, vector: Tensor) -> Tensor:
    """``(batch, functions, width)`` rows times ``(batch, width)`` vectors."""
    return (rows @ vector[:, :, None]).squeeze(2)


class PowerIteration:
    """Largest eigenvalues as differentiable estimates, followed while the weights move.

    Attributes:
        vectors: the current directions by the name of their place, all there is to resume.
    """

    def __init__(self, seed: int = 0) -> None:
        """Start from nothing.

        Args:
            seed: the seed of the first directions.
        """
        self.generator = torch.Generator().manual_seed(seed)
        self.vectors: dict[str, Tensor] = {}

    def advance(self, key: str, link: Link, scales: Tensor, steps: int = 1) -> Tensor:
        r"""Estimate :math:`\lambda_{\max}(M^T \mathrm{diag}(d) M)` after some more iterations.

        Args:
            key: the name of the place.
            link: M.
            scales: ``(pairs, width)`` rows d; negative entries count as 0.
            steps: the number of power iterations.

        Returns:
            ``(pairs,)``.
        """
        if key not in self.vectors:
            shape = (len(scales), link.matrices[-1].shape[1])
            start = torch.randn(shape, generator=self.generator, device="cpu").to(link.weight)
            self.vectors[key] = normalize(start, dim=1)
        # Power iteration wants the largest eigenvalue in size to be the largest one.
        square, self.vectors[key] = top_eigenvalue_estimate(
            link.matrices, scales.clamp(min=0), self.vectors[key], steps
        )
        return square + 1e-12  # keeps the gradient of its root finite

    def recall(self, key: str, link: Link, scales: Tensor, row: Tensor) -> Tensor:
        """The estimate again, for one pair and along its current direction.

        Args:
            key: the name of the place.
            link: as in :meth:`advance`.
            scales: ``(1, width)``, the pair's row.
            row: ``(1,)`` the pair's position, where each has a direction of its own.

        Returns:
            ``(1,)``.
        """
        vectors = self.vectors[key]
        vector = vectors if len(vectors) == 1 else vectors[row]
        scales = scales.clamp(min=0)
        return top_eigenvalue_estimate(link.matrices, scales, vector, steps=0)[0] + 1e-12


class CurvatureEstimate:
    r"""The curvatures :math:`|m|` of all pairs of classes, as differentiable estimates.

    The formula is that of the proved bound, :func:`crcbook.proof.curvature.curvature_sum`. One
    power iteration a call follows each norm's singular vectors while the weights move.
    """

    def __init__(self, model: nn.Sequential, seed: int = 0) -> None:
        """Start from random directions.

        Args:
            model: an :func:`crcbook.mlp`, trained in place elsewhere.
            seed: the seed of the directions.
        """
        self.model = model
        self.classes = trained_layers(model)[-1].weight.shape[0]
        self.label, self.target = (1 - torch.eye(self.classes)).nonzero().T
        self.power = PowerIteration(seed)
        self()  # draws every direction once, so that a checkpoint finds all of them

    def __call__(
        self, steps: int = 1, x: Tensor | None = None, radius: float | None = None
    ) -> Tensor:
        """Estimate the largest curvature at the current weights.

        Args:
            steps: the number of power iterations.
            x: ``(n,)`` the centre of a ball to look in; None for all of R^n.
            radius: the ball's l2 radius; None for slopes at x alone, and bends as anywhere.

        Returns:
            A scalar; only the pair it belongs to takes part in its gradient.
        """
        layers, weights = self._margins()
        local_ranges = None if x is None else partial(_ranges, layers, x, radius)
        with torch.no_grad():
            row = self._pairs(steps, local_ranges).argmax().reshape(1)
        recall = partial(self.power.recall, row=row)
        return curvature_sum(layers, weights[row], recall, local_ranges).sum()

    def table(self, steps: int = 1) -> Tensor:
        """Estimate all curvatures at the current weights.

        Args:
            steps: the number of power iterations.

        Returns:
            ``(classes, classes)``, a row a label and a column a target; 0 on the diagonal.
        """
        pairs = self._pairs(steps)
        table = pairs.new_zeros(self.classes, self.classes)
        return table.index_put((self.label.to(pairs.device), self.target.to(pairs.device)), pairs)

    def _pairs(self, steps: int, local_ranges: RangesOf | None = None) -> Tensor:
        return curvature_sum(
            *self._margins(), partial(self.power.advance, steps=steps), local_ranges
        )

    def _margins(self) -> tuple[list[Layer], Tensor]:
        layers = trained_layers(self.model)
        return layers, layers[-1].weight[self.label] - layers[-1].weight[self.target]


def _ranges(
    layers: Sequence[Layer], x: Tensor, radius: float | None, place: int, links: list[Link]
) -> Ranges:
    """The ranges of a layer's slopes and bends over a ball, as a training sees them."""
    z = Network(tuple(layers)).preactivations(x[None])[place][0]
    if radius is None:
        slope = layers[place].activation.slope(z)
        return slope, slope, *line_ranges(layers[place])[2:]
    reach = radius * sum(link.factor * link.matrix.norm(dim=1) for link in links)
    row = layers[place].activation
    return (*row.slope_interval(z - reach, z + reach), *row.bend_interval(z - reach, z + reach))


class LipschitzEstimate:
    r"""The margins' Lipschitz constants by the product of norms, as differentiable estimates.

    Lipschitz-margin training (Tsuzuku, Sato & Sugiyama 2018) takes the worst margins to be
    :math:`f_t(x_0) - \rho L_{yt}` with

    .. math:: L_{yt} = \|w_y - w_t\| \prod_{I=1}^{L-1} g\|W_I\|.

    GloRo (Leino, Wang & Fredrikson 2021) has the same constants and gathers the worst logits in one
    extra class instead. As in both, each norm is followed by power iteration, one step a call.
    """

    def __init__(self, model: nn.Sequential, seed: int = 0) -> None:
        """Start from random directions.

        Args:
            model: an :func:`crcbook.mlp`, trained in place elsewhere.
            seed: the seed of the directions.
        """
        self.model = model
        self.power = PowerIteration(seed)
        self.table()  # draws every direction once, so that a checkpoint finds all of them

    def table(self, steps: int = 1) -> Tensor:
        """Estimate all constants at the current weights.

        Args:
            steps: the number of power iterations.

        Returns:
            ``(classes, classes)``, symmetric; 0 on the diagonal.
        """
        *hidden, last = trained_layers(self.model)
        table = (last.weight[:, None] - last.weight).norm(dim=2)
        for place, layer in enumerate(hidden):
            ones = torch.ones_like(layer.bias)[None]
            square = self.power.advance(f"norm{place}", Link(layer.weight, 1.0), ones, steps)
            table = table * layer.activation.max_slope * square.sqrt()
        return table

    def margins(self, x: Tensor, y: Tensor, radius: float) -> Tensor:
        """The worst margins in l2 balls, after one more power iteration.

        Args:
            x: ``(batch, n)`` centres.
            y: ``(batch,)`` labels.
            radius: the l2 radius of the ball.

        Returns:
            ``(batch, classes)``, differentiable; 0 at the label.
        """
        return clean_margins(self.model(x), y) - radius * self.table()[y]
