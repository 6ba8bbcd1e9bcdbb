"""How far a float64 evaluation of a network can be from its value in real arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crcbook.activations import ROUNDING
from crcbook.networks import Layer, Network, remembered
from crcbook.proof.arithmetic import OUTWARD, TINY, TINY_NORM, UNIT, gamma, matrix_interval
from crcbook.proof.box import Room
from crcbook.proof.eigenvalues import spectral_norm_bound


@dataclass(frozen=True)
class RoundingModel:
    r"""Error bounds of :meth:`Network.margin_and_gradient` in float64.

    A vector of norms is carried through the layers. If :math:`\hat a` is within
    :math:`\epsilon` of :math:`a`, the computed :math:`\hat z` is within
    :math:`e_z = \|W\|\epsilon + \gamma_{n+2}(\|W\|_F\|\hat a\| + \|b\|)` of z, and the computed
    activation within :math:`g e_z + \tau(g(\|z\| + e_z) + \sqrt{N}|\sigma(0)|)` of its own, where
    :math:`\tau` is ``ROUNDING`` and N the width. No input counts as shorter than ``TINY_NORM``, for
    underflow. Backwards, a vector v within :math:`\eta` of its true value becomes
    :math:`v \odot \sigma'(\hat z)` within :math:`g\eta + \|v\|(h e_z + \tau g)`, and the
    product with :math:`W^T` adds :math:`\gamma_{N+2}\|W\|_F` times its norm.

    Attributes:
        network: the float64 network.
        norms: a proved bound of each weight's spectral norm.
        frobenius: each weight's Frobenius norm, rounded upward.
    """

    network: Network
    norms: tuple[float, ...]
    frobenius: tuple[float, ...]

    @classmethod
    def of(cls, network: Network) -> "RoundingModel":
        """Prepare the bounds of a network.

        Args:
            network: the float64 network.

        Returns:
            The model.
        """
        weights = [layer.weight for layer in network.layers[:-1]]
        frobenius = (float(weight.norm()) * (1 + gamma(weight.numel() + 2)) for weight in weights)
        return cls(network, _spectral_norms(network), tuple(frobenius))

    def deviation(self, weights: Tensor) -> Tensor:
        r"""How far the margin torch evaluates can be from the one of the table, anywhere.

        Args:
            weights: ``(pairs, width)`` rows of the last layer's differences.

        Returns:
            ``(pairs,)`` float64: 0 unless a softplus jumps to the identity above its threshold.
        """
        error = 0.0
        for layer, norm in zip(self.network.layers[:-1], self.norms, strict=True):
            row = layer.activation
            error = row.max_slope * norm * error + len(layer.bias) ** 0.5 * row.deviation
        return weights.norm(dim=1) * error * OUTWARD

    def errors(self, x_norm: Tensor, weight_norm: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the errors of a margin and of its gradient.

        Args:
            x_norm: ``(pairs,)`` norms of the points evaluated.
            weight_norm: ``(pairs,)`` norms of the last layer's differences of rows.
            offset: ``(pairs,)`` sizes of the differences of the last layer's biases.

        Returns:
            ``(pairs,)`` bounds of ``|f - computed f|`` and of the gradient error's l2 norm.
        """
        steps, size, error = self._forward(x_norm)
        terms = gamma(self.network.layers[-1].weight.shape[1] + 4)
        value = weight_norm * error + terms * (weight_norm * (size + error) + 2 * offset.abs())
        gradient = self._gradient_error(weight_norm, steps)
        return value * OUTWARD + TINY, gradient * OUTWARD + TINY

    def preactivation_errors(self, x_norm: Tensor) -> list[Tensor]:
        """Bounds of the errors of :meth:`Network.preactivations`.

        Args:
            x_norm: ``(batch,)`` norms of the points evaluated.

        Returns:
            A tensor ``(batch,)`` a hidden layer, in the l2 norm.
        """
        return [step * OUTWARD for step in self._forward(x_norm)[0]]

    def preactivation_intervals(
        self,
        x: Tensor,
        radius: Tensor,
        room: Room | None = None,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        r"""Where each hidden layer's preactivations stay in balls around the inputs.

        The first layer moves by at most :math:`\rho` times the norms of its rows, and no further
        than the box lets it. For the layers above, two bounds meet: interval arithmetic on the
        activations, and the Lipschitz constant :math:`\|w\| \prod g\|W_J\|` of a row.

        Args:
            x: ``(batch, n)`` inputs.
            radius: ``(batch,)`` l2 radii of the balls.
            room: the box, as the displacements it leaves; None for none.
            first: ``(batch, width)`` ends that the first layer's are known to keep; None for none.

        Returns:
            ``(batch, width)`` lower and upper ends a hidden layer.
        """
        values = self.network.preactivations(x)
        errors = self.preactivation_errors(x.norm(dim=1))
        steepness, intervals, ends = 1.0, [], None
        for layer, z, error, norm in zip(
            self.network.layers, values, errors, self.norms, strict=False
        ):
            rows = layer.weight.norm(dim=1) * OUTWARD
            reach = steepness * radius[:, None] * rows * OUTWARD + error[:, None]
            low, high = z - reach, z + reach
            if ends is None and first is not None:
                low, high = low.maximum(first[0]), high.minimum(first[1])
            if ends is None and room is not None:
                down, up = matrix_interval(room.low, room.high, layer.weight.T)
                low = low.maximum(z + down - error[:, None])
                high = high.minimum(z + up + error[:, None])
            if ends is not None:
                down, up = matrix_interval(*ends, layer.weight.T)
                low, high = low.fmax(down + layer.bias), high.fmin(up + layer.bias)
            # One more rounding of the sums themselves.
            low = low - (low.abs() + error[:, None]) * 8 * UNIT
            high = high + (high.abs() + error[:, None]) * 8 * UNIT
            intervals.append((low, high))
            ends = layer.activation.value_interval(low, high)
            steepness = steepness * norm * layer.activation.max_slope * OUTWARD
        return intervals

    def _forward(self, x_norm: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Each layer's preactivation error, and the size and error of the last activation."""
        size, error, steps = x_norm + TINY_NORM, torch.zeros_like(x_norm), []
        for layer, norm, frobenius in self.hidden():
            row, width = layer.activation, len(layer.bias) ** 0.5
            bias = float(layer.bias.norm())
            at_zero = abs(float(row.value(layer.bias.new_zeros(1))))
            computed = size + error
            error = norm * error + gamma(layer.weight.shape[1] + 2) * (frobenius * computed + bias)
            steps.append(error)
            size = row.max_slope * (norm * size + bias) + width * at_zero
            error = row.max_slope * (1 + ROUNDING) * error + ROUNDING * size
        return steps, size, error

    def hidden(self) -> Iterator[tuple[Layer, float, float]]:
        """The hidden layers, each with its weight's norms.

        Returns:
            Layers, spectral norms and Frobenius norms.
        """
        return zip(self.network.layers[:-1], self.norms, self.frobenius, strict=True)

    def _gradient_error(self, weight_norm: Tensor, steps: list[Tensor]) -> Tensor:
        size, error = weight_norm, 2 * UNIT * weight_norm
        for (layer, norm, frobenius), z_error in zip(
            reversed(list(self.hidden())), reversed(steps), strict=True
        ):
            row = layer.activation
            error = row.max_slope * error + (size + error) * (
                row.max_bend * z_error + 2 * ROUNDING * row.max_slope
            )
            size = row.max_slope * size
            terms = gamma(layer.weight.shape[0] + 2)
            error = norm * error + terms * frobenius * (size + error)
            size = norm * size
        return error


@remembered
def _spectral_norms(network: Network) -> tuple[float, ...]:
    return tuple(spectral_norm_bound(layer.weight) for layer in network.layers[:-1])
