r"""How far an evaluation of a network can be from its value in real arithmetic.

One derivation serves float64 and float32: the formats differ in their constants alone
(:class:`crcbook.proof.arithmetic.Arithmetic`). Norms are carried through the layers. Let the
computed :math:`\hat z` be within :math:`e_z` of z. With the width N of a layer,
:math:`g = \sup|\sigma'|` and :math:`h = \sup|\sigma''|`, and :math:`\tau` for the error of the
table of activations:

- the computed activation is within :math:`e_a = g(1+\tau)e_z + \tau(g\|\hat z\| + \sqrt N
  |\sigma(0)|)` of its own, and the next :math:`\hat z` within :math:`\|W\|e_a +
  \gamma_{n+4}(\|W\|_F\|\hat a\| + \|b\|)`;
- backwards, a vector v within :math:`\eta` of its true value becomes :math:`v \odot
  \sigma'(\hat z)` within :math:`g\eta + \|v\|_\infty h e_z + 2(\tau+u) g\|v\|`, and the product
  with :math:`W^T` adds :math:`\gamma_{N+4}\|W\|_F` times its norm.

What underflow can take is added in every step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.networks import Layer, Network, remembered
from crcbook.proof.arithmetic import DOUBLE, OUTWARD, Arithmetic, gamma
from crcbook.proof.eigenvalues import spectral_norm_bound

_NORMS_OUTWARD = 1 + 2.0**-20  # for norms of as many entries as a matrix may have


@dataclass(frozen=True)
class MarginFacts:
    """Of the two classes of each margin, what its rounding depends on; ``(entries,)`` each.

    Attributes:
        offset: the difference of the last layer's biases.
        deviation: how far the margin torch evaluates can be from that of the table, anywhere.
        norm: the l2 norm of the difference w of the last layer's rows.
        largest: its largest entry, in size.
        rows: the sum of the norms of the two rows.
    """

    offset: Tensor
    deviation: Tensor
    norm: Tensor
    largest: Tensor
    rows: Tensor

    @classmethod
    def of(cls, model: "RoundingModel", label: Tensor, target: Tensor) -> "MarginFacts":
        """What rounding does to margins of these classes, evaluated once for each two of them.

        Args:
            model: the error bounds of the network.
            label: ``(entries,)`` classes.
            target: ``(entries,)`` classes.

        Returns:
            The facts.
        """
        network = model.network
        label, target, place = network.distinct_pairs(label, target)
        weights, last = network.margin_weights(label, target), network.layers[-1]
        rows = last.weight.norm(dim=1)
        columns = (
            last.bias[label] - last.bias[target],
            model.deviation(weights),
            weights.norm(dim=1),
            weights.abs().amax(1),
            rows[label] + rows[target],
        )
        return cls(*(column[place] for column in columns))


@dataclass(frozen=True)
class Forward:
    """What rounding can have done on the way to the last hidden activation; ``(entries,)`` each.

    Attributes:
        model: the error bounds of the network.
        arithmetic: the format of the evaluation.
        steps: bounds of the error of each hidden layer's preactivations, in the l2 norm.
        size: a bound of the norm of the last activation.
        error: a bound of its error.
        largest: no smaller than any product of sizes on the way.
    """

    model: "RoundingModel"
    arithmetic: Arithmetic
    steps: list[Tensor]
    size: Tensor
    error: Tensor
    largest: Tensor

    def value_error(self, facts: MarginFacts, active: Tensor) -> Tensor:
        """A bound of the error of margins.

        Args:
            facts: those of the margins.
            active: ``(entries,)`` the norms of the computed last activations.

        Returns:
            ``(entries,)``, without the facts' deviation.
        """
        arithmetic, last = self.arithmetic, self.model.network.layers[-1]
        terms = arithmetic.gamma(last.weight.shape[1] + 4)
        rows = terms * facts.norm + 4 * arithmetic.unit * facts.rows + arithmetic.tiny
        return facts.norm * self.error + rows * active + arithmetic.tiny

    def gradient_errors(
        self, facts: MarginFacts, units: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Bounds of the errors of a margin's gradients, in the l2 norm.

        Args:
            facts: those of the margins.
            units: ``(entries,)`` the norms of the computed gradients in the first layer's
                preactivations; None for a bound of them.

        Returns:
            ``(entries,)`` that in the first layer's preactivations, and that in the inputs.
        """
        arithmetic = self.arithmetic
        slack, size, largest = 2 * arithmetic.unit * facts.rows, facts.norm, facts.largest
        unit_slack, tiny = slack, arithmetic.tiny
        for (layer, norm, frobenius, _), step in zip(
            reversed(list(self.model.hidden())), reversed(self.steps), strict=True
        ):
            row, terms = layer.activation, arithmetic.gamma(len(layer.bias) + 4)
            rounded = 2 * (arithmetic.activation + arithmetic.unit) * (size + slack)
            bent = largest * row.max_bend * step
            slack = row.max_slope * (slack + rounded) + bent + tiny
            size, unit_slack = row.max_slope * size, slack
            computed = size + slack
            if units is not None and step is self.steps[0]:
                computed = units
            slack = norm * slack + (terms * frobenius + tiny) * computed + tiny
            size = norm * size
            largest = size + slack
        return unit_slack, slack


@dataclass(frozen=True)
class RoundingModel:
    r"""Error bounds of a network's evaluations.

    Attributes:
        network: the float64 network.
        norms: a proved bound of each hidden layer's spectral norm.
        frobenius: each hidden weight's Frobenius norm, rounded upward.
        biases: the norm of each hidden layer's bias.
        gap: :math:`\alpha, \beta` such that what bounds are claimed for, the model that was read or
            its program, is within :math:`\alpha\|x\| + \beta` of the network; for a model from
            :func:`reading_bounds`.
    """

    network: Network
    norms: tuple[float, ...]
    frobenius: tuple[float, ...]
    biases: tuple[float, ...]
    gap: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, network: Network) -> "RoundingModel":
        """Prepare the bounds of a network.

        Args:
            network: the float64 network.

        Returns:
            The model.
        """
        hidden = network.layers[:-1]
        frobenius = tuple(_size(layer.weight) for layer in hidden)
        biases = tuple(_size(layer.bias) for layer in hidden)
        norms = _spectral_norms(network)
        return cls(network, norms, frobenius, biases, reading_bounds(network, norms))

    def hidden(self) -> Iterator[tuple[Layer, float, float, float]]:
        """The hidden layers, with spectral and Frobenius norms and the norms of biases."""
        layers = self.network.layers[:-1]
        return zip(layers, self.norms, self.frobenius, self.biases, strict=True)

    def deviation(self, weights: Tensor) -> Tensor:
        r"""How far the margin torch evaluates can be from the one of the table, anywhere.

        Args:
            weights: ``(pairs, width)`` differences of the last layer's rows.

        Returns:
            ``(pairs,)`` float64: 0 unless a softplus jumps to the identity above its threshold.
        """
        error = 0.0
        for layer, norm, _, _ in self.hidden():
            row = layer.activation
            error = row.max_slope * norm * error + len(layer.bias) ** 0.5 * row.deviation
        return weights.norm(dim=1) * error * OUTWARD

    def first(self, x_norm: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's preactivations, as float64 evaluates them at a point.

        Args:
            x_norm: ``(batch,)`` norms of the points.

        Returns:
            ``(batch,)`` bounds of their norm and of their error's; the point itself, without any
            error, where there is no hidden layer.
        """
        if not self.norms:
            return x_norm, torch.zeros_like(x_norm)
        norm, frobenius, bias = self.norms[0], self.frobenius[0], self.biases[0]
        terms = gamma(self.network.inputs + 4)
        error = terms * (frobenius * x_norm + bias) + DOUBLE.tiny
        return (norm * x_norm + bias + error) * OUTWARD, error * OUTWARD

    def change(self, length: Tensor, arithmetic: Arithmetic) -> Tensor:
        """How far the computed change of the first preactivations can be from the true one.

        Args:
            length: ``(entries,)`` the norms of the displacements.
            arithmetic: the format of the evaluation.

        Returns:
            ``(entries,)`` in the l2 norm; 0 where there is no hidden layer.
        """
        if not self.frobenius:
            return torch.zeros_like(length)
        terms = arithmetic.gamma(self.network.inputs + 4) * self.frobenius[0]
        return (terms + arithmetic.tiny) * length + arithmetic.tiny

    def first_error(self, x: Tensor) -> Tensor:
        """How far the first layer's preactivations, evaluated at inputs, can be from the true ones.

        Args:
            x: ``(batch, n)`` float64.

        Returns:
            ``(batch,)`` in the l2 norm.
        """
        return self.first(x.norm(dim=1) + DOUBLE.tiny_norm)[1]

    def forward(self, size: Tensor, error: Tensor, arithmetic: Arithmetic = DOUBLE) -> Forward:
        """Carry the errors from the first layer's preactivations to the last activation.

        Args:
            size: ``(entries,)`` the norms of the computed first preactivations.
            error: ``(entries,)`` bounds of their error's.
            arithmetic: the format of the evaluation.

        Returns:
            The errors.
        """
        steps: list[Tensor] = []
        largest, tiny = 1 + size, arithmetic.tiny
        for layer, norm, frobenius, bias in self.hidden():
            row = layer.activation
            if steps:
                terms = arithmetic.gamma(layer.weight.shape[1] + 4)
                rounded = (terms * frobenius + tiny) * (size + error) + terms * bias
                error = norm * error + rounded + tiny
                size = norm * size + bias
            steps.append(error)
            at_zero = layer.at_zero
            size = row.max_slope * size + at_zero
            rounded = arithmetic.activation * size + tiny
            error = row.max_slope * (1 + arithmetic.activation) * error + rounded
            largest = largest * (1 + frobenius + bias) * (1 + row.max_slope + at_zero)
        return Forward(self, arithmetic, steps, size, error, largest)

    def gap_at(self, x: Tensor) -> Tensor:
        """How far margins of the network can be from those of the model that was read.

        Args:
            x: ``(batch, n)`` points.

        Returns:
            ``(batch,)``; it grows by ``gap[0]`` a unit of distance.
        """
        alpha, beta = self.gap
        return (alpha * x.norm(dim=1) + beta) * OUTWARD

    def preactivation_errors(self, x_norm: Tensor) -> list[Tensor]:
        """Bounds of the errors of :meth:`Network.preactivations` in float64.

        Args:
            x_norm: ``(batch,)`` norms of the points evaluated.

        Returns:
            A tensor ``(batch,)`` a hidden layer, in the l2 norm.
        """
        return [step * OUTWARD for step in self.forward(*self.first(x_norm)).steps]


def _size(values: Tensor) -> float:
    """The l2 norm of all entries, rounded upward."""
    return float(DOUBLE.norm(values.flatten()))


@remembered
def _spectral_norms(network: Network) -> tuple[float, ...]:
    return tuple(spectral_norm_bound(layer.weight) for layer in network.layers[:-1])


def reading_bounds(network: Network, norms: Sequence[float]) -> tuple[float, float]:
    r"""How far margins can be from those of the model that was read, whatever the input.

    The weights of a :class:`Layer` may be off by its ``weight_error`` :math:`\omega`, and its
    bias by :math:`\beta`. If the activations :math:`\hat a` of this network have a norm of at
    most s and are within e of the model's, those of the next layer have a norm of at most
    :math:`g(\|W\|s + \|b\|) + \sqrt{N}|\sigma(0)|` and are within
    :math:`g((\|W\|+\omega)e + \omega s + \beta)`, where :math:`g = \sup|\sigma'|` and N is
    the width. Both are carried along as multiples of :math:`\|x\|_2` plus a constant.

    Args:
        network: the network that was read.
        norms: proved bounds of the spectral norms of all hidden layers' weights.

    Returns:
        :math:`\alpha, \beta` such that every margin of the model is within
        :math:`\alpha\|x\|_2 + \beta` of this network's, at every x in real arithmetic;
        ``(0.0, 0.0)`` where the weights are the model's own.
    """
    if not any(layer.weight_error or layer.bias_error for layer in network.layers):
        return 0.0, 0.0
    size, error = (1.0, 0.0), (0.0, 0.0)  # multiples of the norm of x, and constants
    for layer, norm in zip(network.layers[:-1], norms, strict=True):
        g, omega = layer.activation.max_slope, layer.weight_error
        constants = float(layer.bias.norm()), layer.at_zero
        alpha, beta = (
            g * ((norm + omega) * e + omega * s) for e, s in zip(error, size, strict=True)
        )
        error = alpha, beta + g * layer.bias_error
        size = g * norm * size[0], g * (norm * size[1] + constants[0]) + constants[1]
    last = network.layers[-1]
    # A margin takes the difference of two rows, and of two entries of the bias.
    rows, omega = 2 * float(last.weight.norm(dim=1).max()), 2 * last.weight_error
    alpha, beta = ((rows + omega) * e + omega * s for e, s in zip(error, size, strict=True))
    return alpha * _NORMS_OUTWARD, (beta + 2 * last.bias_error) * _NORMS_OUTWARD
