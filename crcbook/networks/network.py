r"""Fully connected networks.

A network is :math:`a^{(0)} = x`, :math:`z^{(I)} = W_I a^{(I-1)} + b_I`,
:math:`a^{(I)} = \sigma(z^{(I)})`, with logits :math:`z^{(L)}`. The margin of class y over class t
is :math:`f(x) = z^{(L)}_y(x) - z^{(L)}_t(x)`.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from threading import Lock

import torch
from torch import Tensor

from crcbook.activations import Activation

_REMEMBERED_NETWORKS = 16  # of which what is proved is kept, the last ones used
_LARGE = 1e12  # beyond it, or below its inverse, float32 would not do for a search


@dataclass(frozen=True)
class Layer:
    """A linear map followed by an activation.

    Attributes:
        weight: ``(outputs, inputs)``.
        bias: ``(outputs,)``.
        activation: the row of the table; the identity for the logits.
        weight_error: a proved bound of the spectral norm of what the weight is off by: where a
            model applies several linear maps in turn, their product had to be rounded.
        bias_error: a proved bound of the l2 norm of what the bias is off by.
    """

    weight: Tensor
    bias: Tensor
    activation: Activation
    weight_error: float = 0.0
    bias_error: float = 0.0

    @property
    def at_zero(self) -> float:
        """The l2 norm of the activations of units whose preactivations are all 0."""
        return self.activation.at_zero * len(self.bias) ** 0.5


@dataclass(frozen=True)
class LayerChain:
    """Layers in the order data flows through them, and the derivatives of the hidden ones.

    Attributes:
        layers: at least one; the last one has no part in what the methods here carry along.
    """

    layers: tuple[Layer, ...]

    @property
    def inputs(self) -> int:
        """The number of input coordinates."""
        return self.layers[0].weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.layers[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.layers[0].weight.dtype

    def preactivations(self, x: Tensor) -> list[Tensor]:
        """The inputs z of each hidden layer's activation.

        Args:
            x: ``(batch, n)``.

        Returns:
            A tensor ``(batch, width)`` a hidden layer.
        """
        values = []
        for layer in self.layers[:-1]:
            values.append(torch.addmm(layer.bias, x, layer.weight.T))
            x = layer.activation.value(values[-1])
        return values

    def first(self, x: Tensor) -> Tensor:
        """The preactivations of the first layer; the input where there is no hidden layer.

        Args:
            x: ``(batch, n)``.

        Returns:
            ``(batch, width)``.
        """
        if len(self.layers) == 1:
            return x
        return torch.addmm(self.layers[0].bias, x, self.layers[0].weight.T)

    def change(self, d: Tensor) -> Tensor:
        """How displacements of the input change the first layer's preactivations.

        Args:
            d: ``(batch, n)``.

        Returns:
            ``(batch, width)``; d itself where there is no hidden layer.
        """
        return d if len(self.layers) == 1 else d @ self.layers[0].weight.T

    def input_gradient(self, units: Tensor) -> Tensor:
        """Gradients in the inputs, of those in the first layer's preactivations.

        Args:
            units: ``(..., width)``.

        Returns:
            ``(..., n)``; the same where there is no hidden layer.
        """
        return units if len(self.layers) == 1 else units @ self.layers[0].weight

    def active(self, x: Tensor) -> Tensor:
        """The last hidden activation; the input where there is no hidden layer.

        Args:
            x: ``(batch, n)``.

        Returns:
            ``(batch, width)``.
        """
        for layer in self.layers[:-1]:
            x = layer.activation.value(torch.addmm(layer.bias, x, layer.weight.T))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The logits.

        Args:
            x: ``(batch, n)``.

        Returns:
            ``(batch, classes)``.
        """
        return self.outputs(self.active(x))

    def outputs(self, active: Tensor) -> Tensor:
        """The logits, of the last hidden activation.

        Args:
            active: ``(batch, width)`` what :meth:`active` returned.

        Returns:
            ``(batch, classes)``.
        """
        return torch.addmm(self.layers[-1].bias, active, self.layers[-1].weight.T)

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What follows the first layer's preactivations.

        Args:
            z: what :meth:`first` returned.

        Returns:
            The last hidden activation and every hidden layer's slopes, ``(batch, width)`` each.
        """
        x = z
        slopes: list[Tensor] = []
        for layer in self.layers[:-1]:
            z = torch.addmm(layer.bias, x, layer.weight.T) if slopes else z
            slopes.append(layer.activation.slope(z))
            x = layer.activation.value(z)
        return x, slopes

    def backward(self, gradient: Tensor, slopes: list[Tensor]) -> Tensor:
        """The gradient in the first preactivations of a function of the last activation.

        Args:
            gradient: ``(..., width)`` that in the last activation.
            slopes: what :meth:`forward` returned.

        Returns:
            ``(..., width)``.
        """
        for place in range(len(slopes) - 1, -1, -1):
            gradient = gradient * slopes[place]
            if place:
                gradient = gradient @ self.layers[place].weight
        return gradient


@dataclass(frozen=True)
class Network(LayerChain):
    """A classifier: a chain of layers, the last of which gives the logits.

    Attributes:
        key: a hash of every weight and activation, so that an edited model is another network; None
            where nothing is to be remembered of it.
    """

    key: str | None = None

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.layers[-1].weight.shape[0]

    @property
    def rough(self) -> "Network":
        """The same network for searches that need no proof: in float32, if that holds its sizes."""
        sizes = [float(layer.weight.abs().max()) for layer in self.layers]
        fits = all(size == 0 or 1 / _LARGE < size < _LARGE for size in sizes)
        return self.to(torch.float32) if fits else self

    def to(self, dtype: torch.dtype) -> "Network":
        """The same network with rounded weights.

        Args:
            dtype: a floating-point dtype.

        Returns:
            A network without a key, whose layers no longer say what they are off by.
        """
        layers = (
            Layer(layer.weight.to(dtype), layer.bias.to(dtype), layer.activation)
            for layer in self.layers
        )
        return Network(tuple(layers))

    def margin(self, active: Tensor, label: Tensor, target: Tensor) -> Tensor:
        """The margin f of ``label`` over ``target``, of the last hidden activation.

        Args:
            active: ``(pairs, width)`` what :meth:`active` returned.
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.

        Returns:
            ``(pairs,)``.
        """
        bias = self.layers[-1].bias
        return (self.margin_weights(label, target) * active).sum(1) + (bias[label] - bias[target])

    def margin_weights(self, label: Tensor, target: Tensor) -> Tensor:
        """The last layer's row of ``label`` minus that of ``target``.

        Args:
            label: ``(batch,)`` classes.
            target: ``(batch,)`` classes.

        Returns:
            ``(batch, width of the last hidden layer)``.
        """
        weight = self.layers[-1].weight  # index_select takes rows several times faster than []
        return weight.index_select(0, label).sub_(weight.index_select(0, target))

    def distinct_pairs(self, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each pair of classes that occurs, once.

        Args:
            label: classes, of any shape.
            target: classes, of a shape that broadcasts with it.

        Returns:
            ``(distinct,)`` labels, ``(distinct,)`` targets, and where each of the given pairs is
            among them.
        """
        code, place = torch.unique(label * self.classes + target, return_inverse=True)
        return code // self.classes, code % self.classes, place

    def margin_and_gradient(
        self, x: Tensor, label: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The margin f of ``label`` over ``target`` and its gradient.

        Args:
            x: ``(pairs, n)``.
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.

        Returns:
            ``f`` as ``(pairs,)`` and its gradient as ``(pairs, n)``.
        """
        margin, units = self.margin_and_units(x, label, target)
        return margin, self.input_gradient(units)

    def margin_and_units(self, x: Tensor, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The margin and its gradient in the first layer's preactivations.

        Args:
            x: ``(pairs, n)``.
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.

        Returns:
            ``f`` as ``(pairs,)`` and the gradient as ``(pairs, width)``; that in the inputs where
            there is no hidden layer.
        """
        active, slopes = self.forward(self.first(x))
        units = self.backward(self.margin_weights(label, target), slopes)
        return self.margin(active, label, target), units

    def logits_and_slopes(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The logits, and what gradients are made of.

        Args:
            x: ``(batch, n)``.

        Returns:
            ``(batch, classes)`` logits, ``(batch, width)`` preactivations of the first layer (the
            inputs where there is no hidden layer), and every hidden layer's slopes.
        """
        z = self.first(x)
        active, slopes = self.forward(z)
        return self.outputs(active), z, slopes

    def units(
        self, slopes: list[Tensor], label: Tensor, target: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Gradients of margins in the first layer's preactivations.

        Args:
            slopes: those of :meth:`logits_and_slopes`.
            label: ``(batch,)`` classes.
            target: ``(batch, count)`` classes whose logits to subtract.
            dtype: what to round to.

        Returns:
            ``(batch, count, width)``; gradients in the inputs where there is no hidden layer.
        """
        *pairs, place = self.distinct_pairs(label[:, None], target)
        rows = self.margin_weights(*pairs)
        if len(slopes) == 1:  # products only: they can as well be rounded first
            return rows.to(dtype)[place].mul_(slopes[0].to(dtype)[:, None])
        return self.backward(rows[place], [slope[:, None] for slope in slopes]).to(dtype)


@dataclass(frozen=True)
class MarginAlong:
    """Margins on segments, as a function of the fraction of the way.

    Attributes:
        network: the network.
        begin: ``(pairs, width)`` the first layer's preactivations where the segments begin.
        way: ``(pairs, width)`` their change to the ends.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
    """

    network: Network
    begin: Tensor
    way: Tensor
    label: Tensor
    target: Tensor

    @classmethod
    def of(
        cls,
        network: Network,
        ends: tuple[Tensor, Tensor],
        label: Tensor,
        target: Tensor,
        begin: Tensor | None = None,
    ) -> "MarginAlong":
        """The margins on segments, where the first layer's preactivations are interpolated.

        Args:
            network: the network.
            ends: ``(pairs, n)`` each, where the segments begin and end.
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.
            begin: ``(pairs, width)`` the first layer's preactivations where they begin, if known.

        Returns:
            A function of ``(pairs,)`` fractions of the way.
        """
        first, (start, end) = network.layers[0], ends
        if begin is None:
            begin = torch.addmm(first.bias, start, first.weight.T)
        return cls(network, begin, (end - start) @ first.weight.T, label, target)

    def __call__(self, fraction: Tensor) -> Tensor:
        """The margins.

        Args:
            fraction: ``(pairs,)`` fractions of the way.

        Returns:
            ``(pairs,)``.
        """
        first, *rest = self.network.layers
        x = first.activation.value(self.begin + fraction[:, None] * self.way)
        for layer in rest:
            x = layer.activation.value(torch.addmm(layer.bias, x, layer.weight.T))
        return logit_margin(x, self.label, self.target)

    def take(self, index: Tensor) -> "MarginAlong":
        """Some of the segments.

        Args:
            index: positions.

        Returns:
            Their margins.
        """
        columns = self.begin, self.way, self.label, self.target
        return MarginAlong(self.network, *(column.index_select(0, index) for column in columns))


def logit_margin(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """The logit of one class minus that of another.

    Args:
        logits: ``(batch, classes)``.
        label: ``(batch,)`` classes.
        target: ``(batch,)`` classes.

    Returns:
        ``(batch,)``.
    """
    return (logits.gather(1, label[:, None]) - logits.gather(1, target[:, None])).squeeze(1)


def remembered(function: Callable) -> Callable:
    """Remember what a function makes of a network under the hash of its weights.

    Only the last few networks are remembered; an edited model is another network.

    Args:
        function: of a :class:`Network` alone.

    Returns:
        The function, with its memory. It raises ValueError for a network without a key.
    """
    memory: OrderedDict[tuple, object] = OrderedDict()
    lock = Lock()

    @wraps(function)
    def recall(network: Network):
        if network.key is None:
            raise ValueError(f"{function.__name__} needs a network that read_network has read")
        key = (network.key, network.device)
        with lock:
            known = key in memory
            found = memory.get(key)
        if not known:
            with torch.inference_mode(False):  # it outlives the caller's mode
                found = function(network)
        with lock:
            found = memory.setdefault(key, found)
            memory.move_to_end(key)
            while len(memory) > _REMEMBERED_NETWORKS:
                memory.popitem(last=False)
        return found

    return recall
