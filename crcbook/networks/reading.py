"""Reading a network out of a ``torch.nn`` module, and refusing what cannot be certified."""

import hashlib
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from crcbook.activations import ACTIVATIONS, IDENTITY, activation_of
from crcbook.networks.comparing import check_modes, compare
from crcbook.networks.network import Layer, Network

_CALLED = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")  # what a module computes
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Where squares and products neither vanish nor overflow, however the proofs arrange them.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SIZES, _PRODUCTS, _MOST_UNITS = (1e-50, 1e50), (1e-100, 1e100), 200_000
_ADVICE = {  # what to do about layers that are no activations
    nn.Linear: "remove its parametrizations first",
    (nn.Dropout, nn.AlphaDropout): "leave it out: it acts in training alone",
    (nn.Softmax, nn.LogSoftmax): "leave it out: it does not change which class wins",
    nn.BatchNorm1d: "fold it into the Linear layer beside it",
}


def read_network(model: nn.Sequential, at: Tensor | None = None) -> Network:
    """Read a Sequential of Flatten, Linear and activations as a float64 network.

    What was read is compared with the model itself, at random points and at the inputs given.

    Args:
        model: any Sequential (nested ones too) of ``Flatten``, ``Linear`` and the activations of
            the table, in any float dtype, on any device.
        at: ``(batch, *input_shape)`` inputs at which to compare as well; None for random points
            alone.

    Returns:
        The network with float64 copies of the weights, on the model's device.

    Raises:
        TypeError: where the model is no Sequential.
        ValueError: for a layer, an order of layers or weights that cannot be certified, and for
            modules that compute something else than their class says (hooks, a ``forward`` of
            their own, or what only the comparison shows).
        RuntimeError: inside ``torch.autocast`` and other contexts that change what torch computes.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model must be a torch.nn.Sequential; got {type(model).__name__}")
    check_modes()
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
    network = Network(tuple(layers), _key(layers))
    if at is not None and at[0].numel() != network.inputs:
        at = None  # refused where inputs are checked
    like = next(module.weight for module in submodules(model) if isinstance(module, nn.Linear))
    compare(model, network, (network.inputs,), like, at)
    return network


def _check_unchanged(module: nn.Module) -> None:
    kind = nn.Sequential if isinstance(module, nn.Sequential) else type(module)
    if any(
        name in vars(module) or getattr(type(module), name) != getattr(kind, name)
        for name in _CALLED
    ):
        raise ValueError(
            f"cannot certify {type(module).__name__}: its forward is not that of its layers in turn"
        )
    if module._compiled_call_impl is not None:
        raise ValueError(f"cannot certify a compiled {type(module).__name__}: give the original")
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
    name = f"Linear layer {position}"
    weight = _values(module.weight, f"{name}: weight", ("outputs", "inputs"))
    bias = weight.new_zeros(len(weight))
    if module.bias is not None:
        bias = _values(module.bias, f"{name}: bias", ("outputs",))
    if bias.shape != weight.shape[:1]:  # torch adds a single number to all outputs
        raise ValueError(
            f"{name} must have a bias of shape {tuple(weight.shape[:1])}, one number an output; "
            f"got {tuple(bias.shape)}"
        )
    return Layer(weight, bias, IDENTITY)


def _values(tensor: Tensor, name: str, dims: tuple[str, ...]) -> Tensor:
    """A float64 copy of a plain tensor of numbers."""
    if type(tensor) not in (Tensor, nn.Parameter):  # a subclass may have operations of its own
        raise ValueError(f"{name} must be a plain torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"{name} must be real, of {expected}; got {tensor.dtype}")
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "meta" if tensor.is_meta else tensor.layout
        raise ValueError(f"{name} must hold its numbers in a dense tensor; got a {kind} tensor")
    if tensor.dim() != len(dims) or tensor.numel() == 0:
        raise ValueError(f"{name} must be ({', '.join(dims)}); got shape {tuple(tensor.shape)}")
    tensor = tensor.detach()
    tensor = tensor.cpu() if tensor.device.type == "mps" else tensor  # which has no float64
    tensor = tensor.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must have finite weights; got NaN or infinity")
    return tensor


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
