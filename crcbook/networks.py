r"""Fully connected networks, and reading them out of a ``torch.nn.Sequential``.

A network is :math:`a^{(0)} = x`, :math:`z^{(I)} = W_I a^{(I-1)} + b_I`,
:math:`a^{(I)} = \sigma(z^{(I)})`, with logits :math:`z^{(L)}`. The margin of class y over class t
is :math:`f(x) = z^{(L)}_y(x) - z^{(L)}_t(x)`.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from crcbook.activations import ACTIVATIONS, IDENTITY, Activation, activation_module, activation_of

_REMEMBERED_NETWORKS = 16
_CALLED = ("forward", "__call__", "_call_impl")  # what a module computes
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Where squares and products neither vanish nor overflow, however the proofs arrange them.
_SIZES, _PRODUCTS, _MOST_UNITS = (1e-50, 1e50), (1e-100, 1e100), 200_000
_ADVICE = {  # what to do about layers that are no activations
    nn.Linear: "remove its parametrizations first",
    (nn.Dropout, nn.AlphaDropout): "leave it out: it acts in training alone",
    (nn.Softmax, nn.LogSoftmax): "leave it out: it does not change which class wins",
    nn.BatchNorm1d: "fold it into the Linear layer beside it",
}
_LARGE = 1e12  # beyond it, or below its inverse, float32 would not do for a search
_FAR_RIGHT, _CLOSE_TO_ZERO = 12.0, 0.1  # where the activations are nearly lines


def mlp(sizes: Sequence[int], activation: str = "softplus", seed: int = 0) -> nn.Sequential:
    """A fully connected classifier with torch's default initialisation.

    Args:
        sizes: the widths, from the number of inputs to the number of classes.
        activation: a name from the table of activations.
        seed: the seed of the initialisation; the global generator is left untouched.

    Returns:
        ``Flatten, Linear, activation, ..., Linear``; it takes ``(batch, *input_shape)``.

    Raises:
        ValueError: for fewer than two widths, a width below 1, fewer than two classes, or an
            unknown activation.
    """
    sizes = list(sizes)
    if len(sizes) < 2 or min(sizes) < 1 or sizes[-1] < 2:
        raise ValueError(
            f"sizes must be at least two positive widths, the last one at least 2; got {sizes}"
        )
    activation_module(activation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linears = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)]
    modules: list[nn.Module] = [nn.Flatten()]
    for linear in linears[:-1]:
        modules += [linear, activation_module(activation)]
    return nn.Sequential(*modules, linears[-1])


def architecture(model: nn.Sequential) -> dict:
    """The widths and the activation of an :func:`crcbook.mlp`.

    Args:
        model: the network.

    Returns:
        ``{"sizes": [...], "activation": name}``.

    Raises:
        ValueError: for a model ``mlp`` would not build.
    """
    layers = read_network(model).layers
    sizes = [layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
    rows = {layer.activation.name: layer.activation for layer in layers[:-1]}
    name = next(iter(rows), "softplus")
    twin = mlp(sizes, name) if name in ACTIVATIONS else None
    if len(rows) > 1 or twin is None or repr(twin) != repr(model):
        raise ValueError(f"expected a network that crcbook.mlp builds; got {model}")
    return {"sizes": sizes, "activation": name}


def deepen(model: nn.Sequential, layers: int) -> nn.Sequential:
    """A deeper network that computes almost the same, to train on from there.

    Hidden layers that copy their input are put before the last one ("Net2Net", Chen, Goodfellow &
    Shlens 2016). A smooth activation has no identity, so they work where it is nearly a line: far
    to the right for those that grow, close to 0 for those that saturate.

    Args:
        model: an :func:`mlp` with a hidden layer.
        layers: how many linear layers the deeper one has.

    Returns:
        The network, in the model's dtype, on its device.

    Raises:
        ValueError: for a model that ``mlp`` would not build, without a hidden layer, or with more
            layers.
    """
    facts = architecture(model)
    *hidden, last = read_network(model).layers
    if not 1 <= len(hidden) < layers:
        raise ValueError(f"cannot make {layers} layers of a network with {len(hidden) + 1}")
    row = hidden[-1].activation
    centre, scale = (_FAR_RIGHT, 1.0) if row.slope_limits[1] == 1 else (0.0, _CLOSE_TO_ZERO)
    value, slope = (end(last.bias.new_tensor(centre)) for end in (row.value, row.slope))
    weights = [(layer.weight, layer.bias) for layer in hidden]
    units = len(hidden[-1].bias)
    shrink, shift = torch.ones_like(slope), torch.zeros_like(slope)  # what undoes the last copy
    for _ in range(layers - len(hidden) - 1):
        identity = torch.eye(units).to(last.weight)
        weights.append((scale * shrink * identity, (centre + scale * shift).expand(units)))
        shrink = 1 / (scale * slope)
        shift = -value * shrink
    weights.append((shrink * last.weight, last.bias + shift * last.weight.sum(1)))
    sizes = facts["sizes"][:-1] + [units] * (layers - len(hidden) - 1) + facts["sizes"][-1:]
    deeper = mlp(sizes, facts["activation"]).to(next(model.parameters()))
    values = [value for pair in weights for value in pair]
    deeper.load_state_dict(dict(zip(deeper.state_dict(), values, strict=True)))
    return deeper


@dataclass(frozen=True)
class Layer:
    """A linear map followed by an activation.

    Attributes:
        weight: ``(outputs, inputs)``.
        bias: ``(outputs,)``.
        activation: the row of the table; the identity for the logits.
    """

    weight: Tensor
    bias: Tensor
    activation: Activation


@dataclass(frozen=True)
class Network:
    """The layers of a classifier, in the order data flows through them.

    Attributes:
        layers: at least one; the last one gives the logits.
        key: a hash of every weight and activation, so that an edited model is another network; None
            where nothing is to be remembered of it.
    """

    layers: tuple[Layer, ...]
    key: str | None = None

    @property
    def inputs(self) -> int:
        """The number of input coordinates."""
        return self.layers[0].weight.shape[1]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.layers[-1].weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.layers[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.layers[0].weight.dtype

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
            A network without a key.
        """
        layers = (
            Layer(layer.weight.to(dtype), layer.bias.to(dtype), layer.activation)
            for layer in self.layers
        )
        return Network(tuple(layers))

    def logits(self, x: Tensor) -> Tensor:
        """The logits.

        Args:
            x: ``(batch, n)``.

        Returns:
            ``(batch, classes)``.
        """
        for layer in self.layers:
            x = layer.activation.value(torch.addmm(layer.bias, x, layer.weight.T))
        return x

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
        self, x: Tensor, label: Tensor, target: Tensor, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The margin f of ``label`` over ``target`` and its gradient.

        Args:
            x: ``(pairs, n)``.
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.
            shift: ``(pairs, width)``, added to the first layer's preactivations; None for nothing.

        Returns:
            ``f`` as ``(pairs,)`` and its gradient as ``(pairs, n)``.
        """
        margin, gradient = self.margin_and_units(x, label, target, shift)
        return margin, gradient if len(self.layers) == 1 else gradient @ self.layers[0].weight

    def margin_along(
        self,
        start: Tensor,
        end: Tensor,
        label: Tensor,
        target: Tensor,
        begin: Tensor | None = None,
    ) -> "MarginAlong":
        """The margins on segments, where the first layer's preactivations are interpolated.

        Args:
            start: ``(pairs, n)``.
            end: ``(pairs, n)``.
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.
            begin: ``(pairs, width)`` the first layer's preactivations at ``start``, if known.

        Returns:
            A function of ``(pairs,)`` fractions of the way.
        """
        first = self.layers[0]
        if begin is None:
            begin = torch.addmm(first.bias, start, first.weight.T)
        return MarginAlong(self, begin, (end - start) @ first.weight.T, label, target)

    def margin_and_units(
        self, x: Tensor, label: Tensor, target: Tensor, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The margin and its gradient in the first layer's preactivations.

        Args:
            x: ``(pairs, n)``.
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.
            shift: as in :meth:`margin_and_gradient`.

        Returns:
            ``f`` as ``(pairs,)`` and the gradient as ``(pairs, width)``; that in the inputs where
            there is no hidden layer.
        """
        x, slopes = self.forward(self.first(x, shift))
        gradient = self.margin_weights(label, target)
        offset = self.layers[-1].bias[label] - self.layers[-1].bias[target]
        return (gradient * x).sum(1) + offset, self.backward(gradient, slopes)

    def logits_and_slopes(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The logits, and what gradients are made of.

        Args:
            x: ``(batch, n)``.

        Returns:
            ``(batch, classes)`` logits, ``(batch, width)`` preactivations of the first layer (the
            inputs where there is no hidden layer), and every hidden layer's slopes.
        """
        z = self.first(x)
        x, slopes = self.forward(z)
        return torch.addmm(self.layers[-1].bias, x, self.layers[-1].weight.T), z, slopes

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

    def first(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """The preactivations of the first layer; the input where there is no hidden layer.

        Args:
            x: ``(batch, n)``.
            shift: ``(batch, width)``, added to them; None for nothing.

        Returns:
            ``(batch, width)``.
        """
        if len(self.layers) == 1:
            return x
        z = torch.addmm(self.layers[0].bias, x, self.layers[0].weight.T)
        return z if shift is None else z + shift

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What follows the first layer's preactivations.

        Args:
            z: what :meth:`first` returned.

        Returns:
            The last hidden activation and every hidden layer's slopes, ``(batch, width)`` each.
        """
        x, slopes = z, []
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
        return (x.gather(1, self.label[:, None]) - x.gather(1, self.target[:, None])).squeeze(1)

    def take(self, index: Tensor) -> "MarginAlong":
        """Some of the segments.

        Args:
            index: positions.

        Returns:
            Their margins.
        """
        columns = self.begin, self.way, self.label, self.target
        return MarginAlong(self.network, *(column.index_select(0, index) for column in columns))


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


def read_network(model: nn.Sequential) -> Network:
    """Read a Sequential of Flatten, Linear and activations as a float64 network.

    Args:
        model: any Sequential (nested ones too) of ``Flatten``, ``Linear`` and the activations of
            the table, in any float dtype, on any device.

    Returns:
        The network with float64 copies of the weights, on the model's device.

    Raises:
        TypeError: where the model is no Sequential.
        ValueError: for a layer, an order of layers or weights that cannot be certified, and for
            modules that compute something else than their class says (hooks, a ``forward`` of
            their own).
        RuntimeError: inside ``torch.autocast``.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model must be a torch.nn.Sequential; got {type(model).__name__}")
    _check_unchanged(model)
    layers: list[Layer] = []
    for module in submodules(model):
        if type(module) is nn.Flatten:
            _check_flatten(module)
        elif type(module) is nn.Linear:
            layers.append(_linear(module, len(layers)))
        else:
            layers = _activated(layers, module)
    _check_shapes(layers)
    _check_sizes(layers)
    if torch.is_autocast_enabled(layers[0].weight.device.type):
        raise RuntimeError("certificates need full precision: leave torch.autocast first")
    return Network(tuple(layers), _key(layers))


def _check_unchanged(module: nn.Module) -> None:
    kind = nn.Sequential if isinstance(module, nn.Sequential) else type(module)
    if any(
        name in vars(module) or getattr(type(module), name) != getattr(kind, name)
        for name in _CALLED
    ):
        raise ValueError(
            f"cannot certify {type(module).__name__}: its forward is not that of its layers in turn"
        )
    if any(getattr(module, name) or getattr(modules, f"_global{name}") for name in _HOOKS):
        raise ValueError(
            f"cannot certify {type(module).__name__} with forward hooks, which may change what it "
            "computes: remove them first (pruning and weight_norm have their own remove functions)"
        )


def submodules(model: nn.Sequential) -> Iterable[nn.Module]:
    """The modules of a Sequential, in the order data flows through them.

    Args:
        model: a Sequential, and any nested ones.

    Yields:
        Modules that are no Sequential themselves.

    Raises:
        ValueError: for a module that computes something else than its class says.
    """
    for module in model:
        _check_unchanged(module)
        if isinstance(module, nn.Sequential):
            yield from submodules(module)
        else:
            yield module


def _check_flatten(module: nn.Flatten) -> None:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise ValueError(f"Flatten must flatten all but the batch; got {module}")


def _linear(module: nn.Linear, position: int) -> Layer:
    weight = module.weight.detach()
    if not weight.is_floating_point():
        raise ValueError(f"Linear layer {position} must have real weights; got {weight.dtype}")
    if weight.device.type == "mps":  # has no float64
        weight = weight.cpu()
    weight = weight.to(torch.float64, copy=True)
    bias = weight.new_zeros(weight.shape[0])
    if module.bias is not None:
        bias = module.bias.detach().to(weight, copy=True)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"Linear layer {position} must have finite weights; got NaN or infinity")
    return Layer(weight, bias, IDENTITY)


def _activated(layers: list[Layer], module: nn.Module) -> list[Layer]:
    activation = activation_of(module)
    if activation is None:
        advice = (text for kinds, text in _ADVICE.items() if isinstance(module, kinds))
        advice = next(advice, "a certificate by curvature needs a smooth activation")
        supported = ", ".join(["Flatten", "Linear", "Identity", *ACTIVATIONS])
        raise ValueError(
            f"cannot certify the layer {module}: expected one of {supported} ({advice})"
        )
    if activation is IDENTITY:
        return layers
    if not layers or layers[-1].activation is not IDENTITY:
        raise ValueError(f"expected a Linear layer before {module}")
    return [*layers[:-1], Layer(layers[-1].weight, layers[-1].bias, activation)]


def _check_shapes(layers: list[Layer]) -> None:
    if not layers or layers[-1].activation is not IDENTITY:
        raise ValueError("the model must end in a Linear layer that gives the logits")
    for first, second in pairwise(layers):
        if first.weight.shape[0] != second.weight.shape[1]:
            raise ValueError(
                f"a Linear layer with {second.weight.shape[1]} inputs follows one "
                f"with {first.weight.shape[0]} outputs"
            )
    if layers[-1].weight.shape[0] < 2:
        raise ValueError("the model must have at least two classes; its last layer has one output")


def _check_sizes(layers: list[Layer]) -> None:
    product = 1.0
    for position, layer in enumerate(layers):
        if max(layer.weight.shape) > _MOST_UNITS:
            raise ValueError(f"layers may have at most {_MOST_UNITS} units, and so many inputs")
        sizes = torch.cat([layer.weight.abs().flatten(), layer.bias.abs()])
        least, most = sizes.masked_fill(sizes == 0, torch.inf).min(), sizes.max()
        if least < _SIZES[0] or most > _SIZES[1]:
            raise ValueError(
                f"Linear layer {position} must have weights of a size from {_SIZES[0]:g} to "
                f"{_SIZES[1]:g}, or 0; got {least:g} to {most:g}"
            )
        product *= float(layer.weight.abs().max()) or 1.0
    if not _PRODUCTS[0] <= product <= _PRODUCTS[1]:
        raise ValueError(
            f"the layers' largest weights must have a product from {_PRODUCTS[0]:g} to "
            f"{_PRODUCTS[1]:g}; got {product:g}"
        )


def _key(layers: list[Layer]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for layer in layers:
        row = layer.activation
        digest.update(f"{row.name} {row.max_bend} {tuple(layer.weight.shape)}".encode())
        digest.update(layer.weight.cpu().numpy().tobytes())
        digest.update(layer.bias.cpu().numpy().tobytes())
    return digest.hexdigest()
