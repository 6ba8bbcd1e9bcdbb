"""The operations that are read: what each of them does, as an affine map or an activation.

A reader takes the function that torch was asked for, the recorded input and the arguments, and
gives the steps that this is. It is found by the function itself, not by a name.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from crcbook.activations import ACTIVATIONS, OTHER_ACTIVATIONS, Activation, celu, softplus
from crcbook.networks.affine import Affine
from crcbook.networks.branches import joined
from crcbook.networks.modules import gelu

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BATCH_NORM_TERMS = 6  # a sum, a root, a quotient and a product, with two to spare


class Unreadable(ValueError):
    """An operation that cannot be certified, or is not known."""


@dataclass(frozen=True)
class Head:
    """Something after the logits that changes no answer, such as a softmax.

    Attributes:
        name: what torch calls it.
        value: the function of the logits, ``(batch, classes)``.
    """

    name: str
    value: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """Part of an activation that someone wrote out, which is nothing by itself.

    Attributes:
        name: what torch calls it.
        number: what it compares with; None for none.
        reason: why it is refused where no activation is made of it.
    """

    name: str
    number: float | None
    reason: str


Step = Affine | Activation | Head | Piece


Reader = Callable[..., tuple[Step, ...]]


def _constant(value, name: str) -> Tensor:
    """A constant as a float64 tensor on the CPU."""
    if isinstance(value, Tensor):
        return plain_values(value, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Unreadable(f"{name} takes a {type(value).__name__}")
    return plain_values(torch.tensor(float(value), dtype=torch.float64, device="cpu"), name)


def plain_values(tensor: Tensor, name: str) -> Tensor:
    """A float64 copy of a plain tensor of numbers, on the CPU.

    Args:
        tensor: the tensor.
        name: what to call it in messages.

    Returns:
        The copy.

    Raises:
        ValueError: for a tensor of a class, layout or dtype of its own, or numbers not finite.
    """
    check_plain(tensor, name)
    if tensor.dtype not in DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name} must be real, of {expected}; got {tensor.dtype}")
    tensor = tensor.detach().cpu()
    tensor = tensor.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty")
    if not tensor.abs().max() < torch.inf:  # several times faster than isfinite
        raise ValueError(f"{name} must have finite weights; got NaN or infinity")
    return tensor


def check_plain(tensor: Tensor, name: str) -> None:
    """Refuse tensors that are no plain arrays of numbers.

    Args:
        tensor: the tensor.
        name: what to call it in messages.

    Raises:
        ValueError: for a subclass, which may have operations of its own, a tensor without numbers
            or of a layout or dtype of its own.
    """
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{name} has no shape yet: evaluate the lazy model once, model(x)")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name} must be a plain torch.Tensor; got {type(tensor).__name__}")
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "meta" if tensor.is_meta else tensor.layout
        raise ValueError(f"{name} must hold its numbers in a dense tensor; got a {kind} tensor")
    if tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype not in DTYPES):
        raise ValueError(
            f"{name} must be of float16, bfloat16, float32 or float64; got {tensor.dtype}"
        )


def _shape_of(x: Tensor) -> tuple[int, ...]:
    """The shape of an item."""
    return tuple(x.shape[1:])


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float64, device="cpu")


def _same(function: Callable[[Tensor], Tensor], name: str, **facts) -> Affine:
    """A step whose coefficients are not negative."""
    return Affine(name, function, function, **facts)


def _row_of(constant: Tensor, batch: int, name: str) -> Tensor:
    """What a constant with a batch dimension gives every item."""
    value = _constant(constant, f"a constant of {name}")
    if value.dim() == 0 or len(value) not in (1, batch) or not (value == value[:1]).all():
        raise Unreadable(
            f"{name} takes a constant of shape {tuple(value.shape)} beside a batch: it must be the "
            "same for every item"
        )
    return value[0]


def _arguments(args: tuple, kwargs: dict, *names: str) -> dict:
    """Arguments by name, without those not given."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


# Entries that move


def _unchanged(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    result = func(torch.zeros((), dtype=x.dtype, device="cpu"), *args[1:], **kwargs)
    if result.dtype != x.dtype and result.dtype not in DTYPES[:2]:
        raise Unreadable(f"{name_of(func)} rounds to {result.dtype}")
    return ()


def _batch_of(shape: Sequence[int]) -> str:
    """The shape of a recorded batch, whose number of items is ours and no user's."""
    return f"({', '.join(['batch', *map(str, shape[1:])])})"


def _reshaped(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    result = func(_zeros(x), *args[1:], **kwargs)
    shape = result.shape
    if result.dtype != torch.float64 or len(shape) == 0 or shape[0] != x.shape[0]:
        raise Unreadable(
            f"{name_of(func)} makes {result.dtype} numbers of shape {tuple(shape)} of "
            f"{len(x)} items, {_batch_of(x.shape)}: the first dimension must stay the batch"
        )
    item = tuple(shape[1:])
    return (_same(lambda a: a.reshape(len(a), *item), name_of(func), ordered=True, facts=(item,)),)


def _moved(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    facts = (args[1:], tuple(kwargs.items()))
    return (_same(lambda a: func(a, *args[1:], **kwargs), name_of(func), facts=facts),)


def _resized(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    mode = _arguments(args, kwargs, "input", "size", "scale_factor", "mode").get("mode", "nearest")
    if not mode.startswith("nearest"):
        raise Unreadable(
            f"interpolate with mode={mode!r} is a linear map that crcbook does not read yet: use "
            "mode='nearest'"
        )
    return _moved(func, x, args, kwargs)


def _expanded(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    sizes = args[1] if isinstance(args[1], tuple | list) else args[1:]
    if len(sizes) != x.dim():
        raise Unreadable(f"expand adds a dimension before the batch: {tuple(sizes)}")
    return _moved(func, x, (x, (-1, *sizes[1:])), kwargs)


def _split(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    """A step for each of the parts."""

    def part(place: int, a: Tensor) -> Tensor:
        return func(a, *args[1:], **kwargs)[place]

    facts = (args[1:], tuple(kwargs.items()))
    parts = func(_zeros(x), *args[1:], **kwargs)
    if any(one.dim() == 0 or len(one) != len(x) for one in parts):
        raise Unreadable(f"{name_of(func)} takes a batch apart: give its dim")
    return tuple(
        _same(partial(part, place), name_of(func), facts=(place, *facts))
        for place in range(len(parts))
    )


def _padded(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    given = _arguments(args[1:], kwargs, "pad", "mode", "value")
    pad, mode, value = given["pad"], given.get("mode", "constant"), given.get("value")
    if len(pad) > 2 * (x.dim() - 1):
        raise Unreadable("pad adds to the batch")
    step = partial(functional.pad, pad=tuple(pad), mode=mode)
    shift = None
    if mode == "constant" and value:
        _constant(value, "pad")
        shift = functional.pad(_zeros(x)[0], tuple(pad), value=float(value))
    return (_same(step, "pad", shift=shift, facts=(tuple(pad), mode, value)),)


# Arithmetic with constants


def _operand(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, bool]:
    """The constant, as an item takes it, and whether it comes first."""
    given = _arguments(args, kwargs, "input", "other")
    first = given["input"] is not x
    value = given["input"] if first else given["other"]
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        value = value.to(torch.float64)  # as torch does beside floating-point numbers
    value = _constant(value, f"a constant of {name_of(func)}")
    for more in ("alpha", "rounding_mode"):
        if given.get(more, 1) not in (1, None):
            raise Unreadable(f"{name_of(func)} is read without {more}; got {given[more]!r}")
    if value.dim() == x.dim() and len(value) in (1, len(x)) and (value == value[:1]).all():
        value = value[0]
    if value.dim() >= x.dim():
        raise Unreadable(
            f"{name_of(func)} takes a constant of shape {tuple(value.shape)} beside "
            f"{_batch_of(x.shape)}: it must be the same for every item, without a batch dimension"
        )
    return value, first


def _spread(x: Tensor, value: Tensor) -> tuple[Step, ...]:
    """What makes items as large as a constant that is larger than they are."""
    shape = torch.broadcast_shapes(_shape_of(x), value.shape)
    if shape == x.shape[1:]:
        return ()
    return (_same(lambda a: a.expand(len(a), *shape), "expand", facts=(tuple(shape),)),)


def _shifted(name: str, value: Tensor) -> Affine:
    return _same(lambda a: a, name, shift=value, facts=(value,))


def _negated(*_) -> tuple[Step, ...]:
    return (Affine("neg", torch.neg, lambda a: a),)


def _scaled(value: Tensor, terms: int = 1, stored: bool = True) -> Affine:
    size = value.abs()
    return Affine("mul", lambda a: a * value, lambda a: a * size, terms, stored, facts=(value,))


def _added(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    value, _ = _operand(func, x, args, kwargs)
    return (*_spread(x, value), _shifted("add", value))


def _subtracted(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    value, first = _operand(func, x, args, kwargs)
    if first or _packet(func) in _REVERSED:
        return (*_negated(), *_spread(x, value), _shifted("sub", value))
    return (*_spread(x, value), _shifted("sub", -value))


def _multiplied(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    value, _ = _operand(func, x, args, kwargs)
    return (*_spread(x, value), _scaled(value))


def _divided(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    value, first = _operand(func, x, args, kwargs)
    if first:
        raise Unreadable("the input stands in a denominator")
    if (value == 0).any():
        raise Unreadable("div divides by zero")
    return (*_spread(x, value), divided_by(value))


def divided_by(value: Tensor) -> Affine:
    """The step that divides items by constants.

    Args:
        value: numbers other than 0, of a shape that broadcasts with an item's.

    Returns:
        The step.
    """
    size = value.abs()
    return Affine("div", lambda a: a / value, lambda a: a / size, 1, False, facts=(value,))


# Sums of products


def _linear(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    given = _arguments(args, kwargs, "input", "weight", "bias")
    weight, bias = given["weight"], given.get("bias")
    return _matrix(x, _constant(weight, "a linear layer's weight"), bias, "linear")


def _matrix(x: Tensor, weight: Tensor, bias, name: str) -> tuple[Step, ...]:
    if weight.dim() != 2:
        shape = tuple(weight.shape)
        raise ValueError(f"a linear layer's weight must be (outputs, inputs); got shape {shape}")
    if bias is not None:  # torch adds a single number to all outputs
        bias = _constant(bias, "a linear layer's bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"a linear layer must have a bias of shape {tuple(weight.shape[:1])}, one number "
                f"an output; got {tuple(bias.shape)}"
            )
    size = weight.abs()
    step = Affine(
        name,
        lambda a: a @ weight.T,
        lambda a: a @ size.T,
        terms=weight.shape[1],
        shift=bias,
        facts=(weight, bias),
        matrix=weight if x.dim() == 2 else None,
    )
    return (step,)


def _product(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    first, second = args[:2] if len(args) > 1 else (args[0], *kwargs.values())
    if first is not x or second.dim() != 2:
        raise Unreadable(f"{name_of(func)} is read for inputs times a constant matrix alone")
    return _matrix(x, _constant(second, "a matrix").T, None, "matmul")


def _addmm(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    if len(args) != 3 or args[1] is not x or kwargs:
        raise Unreadable("addmm is read as addmm(bias, input, matrix) alone")
    return _matrix(x, _constant(args[2], "a matrix").T, args[0], "addmm")


def _convolved(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    given = _arguments(args[:3], kwargs, "input", "weight", "bias")
    weight, bias = _constant(given.pop("weight"), "a convolution's weight"), given.pop("bias", None)
    given.pop("input")
    if weight.dim() != x.dim():
        sizes = {3: "length", 4: "height, width", 5: "depth, height, width"}[weight.dim()]
        raise Unreadable(
            f"{name_of(func)} takes (batch, channels, {sizes}); got {_batch_of(x.shape)}. Images "
            "without channels have one: x[:, None]"
        )
    rest, size = args[3:], weight.abs()
    transposed = "transpose" in name_of(func)
    if bias is not None:
        bias = _constant(bias, "a convolution's bias")
        if bias.dim() != 1:
            raise ValueError(f"a convolution's bias must be (channels,); got {tuple(bias.shape)}")
        bias = bias.reshape(-1, *(1 for _ in weight.shape[2:]))
    step = Affine(
        name_of(func),
        lambda a: func(a, weight, None, *rest, **given),
        lambda a: func(a, size, None, *rest, **given),
        terms=weight.numel() // (1 if transposed else len(weight)),
        shift=bias,
        facts=(weight, bias, rest, tuple(given.items())),
    )
    return (step,)


def _convolution(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    """That of a decomposed program, which is told by its arguments what kind it is."""
    names = "input", "weight", "bias", "stride", "padding", "dilation", "transposed"
    given = _arguments(args, kwargs, *names, "output_padding", "groups")
    kind = "conv_transpose" if given["transposed"] else "conv"
    function = getattr(functional, f"{kind}{given['weight'].dim() - 2}d")
    more = {name: given[name] for name in ("stride", "padding", "dilation", "groups")}
    if given["transposed"]:
        more["output_padding"] = given["output_padding"]
    return _convolved(function, x, (x, given["weight"], given["bias"]), more)


def _averaged(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    def average(a: Tensor) -> Tensor:
        return func(a, *args[1:], **kwargs)

    image = average(_zeros(x) + 1)
    if (image < 0).any() or image.dtype != torch.float64:
        raise Unreadable(f"{name_of(func)} divides by a negative number, or rounds")
    # A pool of a batch with channels adds up one channel's numbers; without channels it takes the
    # batch for them.
    place = name_of(func).find("pool")
    pooled = place >= 0 and x.dim() == 2 + int(name_of(func)[place + 4])
    terms = 2 + math.prod(x.shape[2:] if pooled else x.shape[1:])
    facts = (args[1:], tuple(kwargs.items()))
    return (_same(average, name_of(func), terms=terms, stored=False, facts=facts),)


def _batch_norm(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    statistics, affine = ["running_mean", "running_var"], ["weight", "bias"]
    names = [*statistics, *affine] if func is functional.batch_norm else [*affine, *statistics]
    if getattr(func, "_overloadname", "") == "no_stats":
        names = affine
    if not name_of(func).endswith("no_training"):
        names = [*names, "training"]
    given = _arguments(args, kwargs, "input", *names, "momentum", "eps")
    shape = (-1, *(1 for _ in x.shape[2:]))
    mean, variance, weight, bias = (
        None
        if given.get(name) is None
        else _constant(given[name], f"batch_norm's {name}").reshape(shape)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    if mean is None or variance is None:
        raise Unreadable(
            "batch_norm takes its statistics from the batch, for it keeps none: train it with "
            "track_running_stats=True"
        )
    if given.get("training"):
        raise Unreadable("batch_norm takes its statistics from the batch: call model.eval()")
    variance = variance + float(given.get("eps", 1e-5))
    if not bool((variance > 0).all()):
        raise ValueError("batch_norm must have variances above -eps")
    scale = (torch.ones_like(variance) if weight is None else weight) / variance.sqrt()
    steps = _shifted("batch_norm", -mean), _scaled(scale, _BATCH_NORM_TERMS, stored=False)
    return steps if bias is None else (*steps, _shifted("batch_norm", bias))


def _dropped(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    given = _arguments(args, kwargs, "input", "p", "training")
    given.setdefault("training", given.pop("train", "alpha" not in name_of(func)))
    if given["training"] and given.get("p", 0.5) > 0:
        raise Unreadable(f"{name_of(func)} draws at random: call model.eval()")
    return ()


# Activations and heads


def _row(row: Activation) -> Reader:
    return lambda func, x, args, kwargs: (row,)


def _softplus(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    given = _arguments(args, kwargs, "input", "beta", "threshold")
    return (softplus(float(given.get("beta", 1)), float(given.get("threshold", 20))),)


def _gelu(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    return (gelu(kwargs.get("approximate", "none")),)


def _elu(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    given = _arguments(args, kwargs, "input", "alpha", "scale", "input_scale")
    alpha = float(given.get("alpha", 1.0))
    if alpha != 1 or float(given.get("scale", 1)) != 1 or float(given.get("input_scale", 1)) != 1:
        raise Unreadable(
            f"elu has a corner unless alpha is 1 (here {alpha:g}), where its curvature is not "
            "bounded: use alpha=1, or CELU, which has none"
        )
    return (OTHER_ACTIVATIONS["elu"],)


def _celu(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    return (celu(float(_arguments(args, kwargs, "input", "alpha").get("alpha", 1.0))),)


def _piece(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    others = [value for value in (*args, *kwargs.values()) if value is not x]
    turned = name_of(func) == "gt" and args[0] is not x
    if turned or len(others) > 1 or (others and _constant(others[0], "a comparison").dim()):
        raise Unreadable(refusal(func))
    number = float(_constant(others[0], "a comparison")) if others else None
    return (Piece(name_of(func), number, refusal(func)),)


# Branches


def _beside(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    """One branch, with constants beside it."""
    return join(func, [x], [()], _shape_of(x), args, kwargs)


def join(
    func: Callable,
    inputs: Sequence[Tensor],
    branches: Sequence[Sequence[Affine | Activation]],
    shape: tuple[int, ...],
    args: tuple,
    kwargs: dict,
) -> tuple[Affine | Activation, ...]:
    """What adds branches up or puts them beside each other, as a chain of steps.

    Args:
        func: the function.
        inputs: the branches' results, as it takes them.
        branches: the steps of each, from the item that all of them begin with.
        shape: of that item.
        args: the function's arguments.
        kwargs: those by name.

    Returns:
        The steps that follow that item.

    Raises:
        Unreadable: for another function.
    """
    name = name_of(func)
    if reader_of(func) is _beside:
        given = _arguments(args, kwargs, "tensors", "dim")
        dim = given.get("dim", given.get("axis", 0))
        if dim % (inputs[0].dim() + ("stack" in name)) == 0:
            raise Unreadable(f"{name} puts items into the batch: give its dim")
        # A constant where it stands, None for a branch.
        constants = [
            None if any(one is x for x in inputs) else _row_of(one, len(inputs[0]), name)
            for one in given["tensors"]
        ]

        def whole(parts: list[Tensor]) -> Tensor:
            rest, count = iter(parts), len(parts[0])
            return func(
                [
                    next(rest) if row is None else torch.zeros_like(row).expand(count, *row.shape)
                    for row in constants
                ],
                dim,
            )

        # Where the branches stand among the constants.
        facts = dim, *(None if row is None else tuple(row.shape) for row in constants)
        steps = joined(name, branches, shape, whole, whole, facts)
        if all(row is None for row in constants):
            return steps
        nothing = (torch.zeros(1, *x.shape[1:], dtype=torch.float64, device="cpu") for x in inputs)
        shift = func([next(nothing) if row is None else row[None] for row in constants], dim)[0]
        end = steps[-1]
        assert isinstance(end, Affine)
        return (*steps[:-1], replace(end, shift=shift, facts=(*end.facts, shift)))
    reader = reader_of(func)
    if reader not in (_added, _subtracted) or len(inputs) != 2:
        raise Unreadable(
            f"{name} joins two branches, and is read for add, sub, cat and stack alone"
        )
    given = _arguments(args, kwargs, "input", "other")
    if given.get("alpha", 1) != 1:
        raise Unreadable(f"{name} is read for branches without alpha")
    if inputs[0].dim() != inputs[1].dim():
        first, second = (_batch_of(x.shape) for x in inputs)
        raise Unreadable(f"{name} takes {first} and {second}: keep the dimensions (keepdim=True)")
    sign = 1 if reader is _added else -1
    if _packet(func) in _REVERSED:
        branches = branches[::-1]

    def total(parts: list[Tensor]) -> Tensor:
        return parts[0] + sign * parts[1]

    def sizes(parts: list[Tensor]) -> Tensor:
        return parts[0] + parts[1]

    return joined(name, branches, shape, total, sizes, (sign,), terms=1)


def _softmax(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> tuple[Step, ...]:
    dim = _arguments(args, kwargs, "input", "dim").get("dim")
    if x.dim() != 2 or dim not in (1, -1, None):
        raise Unreadable(f"{name_of(func)} is read over the classes of (batch, classes) alone")
    name = name_of(func)
    function = torch.log_softmax if "log" in name else torch.softmax
    return (Head(name, lambda logits: function(logits, 1)),)


# The table


def _called(*names: str) -> Iterator:
    """The functions of these names, wherever torch offers them."""
    places = torch, Tensor, functional, torch._C._nn, torch.special, torch.ops.aten
    for name in names:
        for place in places:
            for spelled in (name, f"{name}_"):
                found = getattr(place, spelled, None)
                if found is not None:
                    yield found


_REVERSED = {Tensor.__rsub__, torch.rsub, torch.ops.aten.rsub}
_MAXIMA = set(_called(*(f"{kind}max_pool{n}d" for n in (1, 2, 3) for kind in ("", "adaptive_"))))
_CORNERS = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "hardtanh"),
    *("hardsigmoid", "hardswish", "threshold", "selu", "clamp", "clip", "clamp_min", "clamp_max"),
    *("abs", "max", "min", "amax", "amin", "maximum", "minimum", "softshrink", "hardshrink"),
    *("sign", "round", "floor", "ceil", "sort", "topk", "where"),
}
_COPIES = set(_called("clone"))
_CHECKS = {"isnan", "isinf", "isfinite", "any", "all", "gt", "ge", "lt", "le", "eq", "ne", "equal"}
_NORMS = {"layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize"}
_SIZES = {"norm", "linalg_norm", "vector_norm", "linalg_vector_norm", "std", "var", "std_mean"}
_UNREAD = {
    *("upsample", "einsum", "fold", "tensordot", "bmm", "mv", "baddbmm", "diff"),
    *("hstack", "vstack", "gather", "take", "vmap", "addcmul", "addcdiv", "lerp"),
    *("masked_fill", "masked_fill_", "__setitem__", "index_put", "scatter", "tril", "triu"),
}
# Of decomposed programs: they give the statistics that they used as well.
_WITH_STATISTICS = (
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    "_native_batch_norm_legit_functional",
)
_NEW = set(_called("new_tensor", "new_full", "new_zeros", "new_ones"))
_ALIKE = set(_called("to", "type_as"))
_FILLED = set(_called("zeros_like", "ones_like", "full_like"))
_READERS: dict = {}
for _reader, _names in {
    _unchanged: ("contiguous", "clone", "detach", "float", "double", "to", "cpu", "cuda", "alias",
                 "type_as", "nan_to_num"),
    _reshaped: ("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"),
    _moved: ("permute", "transpose", "swapaxes", "movedim", "flip", "narrow", "roll", "slice",
             "select", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat", "tile",
             "repeat_interleave", "index_select", "index", "unfold", "im2col", "upsample_nearest1d",
             "upsample_nearest2d", "upsample_nearest3d"),
    _resized: ("interpolate",),
    _expanded: ("expand",),
    _split: ("chunk", "split", "split_with_sizes", "tensor_split", "unbind"),
    _padded: ("pad",),
    _added: ("add",),
    _subtracted: ("sub", "subtract", "rsub"),
    _multiplied: ("mul", "multiply"),
    _divided: ("div", "divide", "true_divide"),
    _negated: ("neg", "negative"),
    _linear: ("linear",),
    _product: ("matmul", "mm", "__matmul__"),
    _addmm: ("addmm",),
    _convolved: tuple(f"conv{kind}{n}d" for n in (1, 2, 3) for kind in ("", "_transpose")),
    _convolution: ("convolution",),
    _beside: ("cat", "concat", "concatenate", "stack"),
    _averaged: (*(f"{kind}avg_pool{n}d" for n in (1, 2, 3) for kind in ("", "adaptive_")),
                "mean", "sum", "cumsum"),
    _batch_norm: ("batch_norm", *_WITH_STATISTICS),
    _dropped: ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
               "feature_alpha_dropout", "feature_dropout"),
    _softplus: ("softplus",),
    _gelu: ("gelu",),
    _elu: ("elu",),
    _celu: ("celu",),
    _softmax: ("softmax", "log_softmax"),
    _piece: ("exp", "log1p", "expm1", "abs", "gt", "minimum"),
    _row(ACTIVATIONS["sigmoid"]): ("sigmoid", "expit"),
    _row(ACTIVATIONS["tanh"]): ("tanh",),
    _row(ACTIVATIONS["silu"]): ("silu",),
    _row(ACTIVATIONS["arctan"]): ("atan", "arctan"),
    _row(OTHER_ACTIVATIONS["mish"]): ("mish",),
    _row(OTHER_ACTIVATIONS["logsigmoid"]): ("logsigmoid", "log_sigmoid"),
    _row(OTHER_ACTIVATIONS["softsign"]): ("softsign",),
}.items():  # fmt: skip
    _READERS.update(dict.fromkeys(_called(*_names), _reader))
_READERS[Tensor.data.__get__] = _unchanged  # type: ignore[attr-defined]
_READERS[Tensor.__rsub__] = _subtracted
_READERS[Tensor.__getitem__] = _moved
_READERS[Tensor.T.__get__] = _READERS[Tensor.mT.__get__] = _moved  # type: ignore[attr-defined]


def reader_of(func: Callable) -> Reader | None:
    """What reads a function of torch.

    Args:
        func: the function, as torch names it to tensors of other classes.

    Returns:
        Its reader; None for a function that is not read.
    """
    return _READERS.get(_packet(func))


def _packet(func: Callable) -> Callable:
    """A function of an exported program without its overload; any other as it is."""
    return getattr(func, "overloadpacket", func)


def may_be_view(func: Callable) -> bool:
    """Whether what a function gives may be the same numbers in memory as what it takes.

    Args:
        func: the function.

    Returns:
        Whether it may.
    """
    same = _unchanged, _reshaped, _moved, _expanded, _split, _dropped
    return reader_of(func) in same and _packet(func) not in _COPIES


def takes_apart(func: Callable) -> bool:
    """Whether a function gives several tensors, each of which its reader has a step for.

    Args:
        func: the function.

    Returns:
        Whether it does.
    """
    return reader_of(func) is _split


def gives_statistics(func: Callable) -> bool:
    """Whether a function gives what its reader reads, and statistics after it.

    Args:
        func: the function.

    Returns:
        Whether it does.
    """
    return name_of(func) in _WITH_STATISTICS


def multiplies(func: Callable) -> bool:
    """Whether a function multiplies or divides its arguments.

    Args:
        func: the function.

    Returns:
        Whether it does.
    """
    products = name_of(func) in ("bmm", "einsum", "baddbmm", "mv", "dot", "inner", "tensordot")
    return products or reader_of(func) in (_multiplied, _divided, _product, _linear)


def makes_constant(func: Callable, first: bool) -> bool:
    """Whether a call takes nothing but the shape of an item, the dtype and the device of the input.

    Args:
        func: the function.
        first: whether the input is its first argument.

    Returns:
        Whether it makes a constant.
    """
    return _packet(func) in (_NEW | _FILLED if first else _ALIKE)


def name_of(func: Callable) -> str:
    """What a function is called.

    Args:
        func: the function.

    Returns:
        Its name, in an exported program without its overload's.
    """
    func = _packet(func)
    name = getattr(func, "__name__", str(func))
    return getattr(func, "__self__", func).__name__ if name == "__get__" else name


def works_in_place(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call changes its input.

    Args:
        func: the function.
        args: its arguments.
        kwargs: those by name.

    Returns:
        Whether it does.
    """
    name = name_of(func)
    if name in ("silu", "mish", "elu", "celu"):  # the last argument of those that have one
        return bool(kwargs.get("inplace", args[-1] is True))
    return name.endswith("_") and not name.endswith("__")


def refusal(func: Callable) -> str:
    """Why a function is not read, and what to do.

    Args:
        func: the function.

    Returns:
        A clause for a message.
    """
    name, func = name_of(func), _packet(func)
    if func in _MAXIMA or name in _CORNERS:
        advice = (
            "use average pooling"
            if func in _MAXIMA
            else "use a smooth activation such as softplus, or "
            "the recipe for ReLU in the book's chapter 'Certify your own network'"
        )
        name = "max pooling" if func in _MAXIMA else name
        return f"{name} has corners, where its curvature is not bounded: {advice}"
    if name in _CHECKS:
        return (
            f"{name} looks at values: a check of the input can be left out, and what is chosen by "
            "a comparison has a corner or a jump"
        )
    if name in _NORMS:
        return (
            f"{name} divides each item by a size of its own, which is neither an affine map nor an "
            "activation: use BatchNorm in eval mode"
        )
    if name in _SIZES:
        return (
            f"{name} is a size of the item's own, no affine map and no activation: "
            "where it scales the item, use BatchNorm in eval mode"
        )
    if name in _UNREAD or name.startswith("fft_"):
        return f"{name} is a linear map that crcbook does not read yet: write it as Linear or Conv"
    if name in ("__bool__", "item", "__float__", "__int__", "tolist", "numpy", "__index__"):
        return f"the forward pass looks at values ({name}), so it is not one formula for all inputs"
    return (
        f"{name} is neither an affine map nor an activation that crcbook knows (it knows Linear, "
        "convolutions, average pooling, BatchNorm in eval mode, padding, reshapes and arithmetic "
        f"with constants; {', '.join([*ACTIVATIONS, *OTHER_ACTIVATIONS, 'celu'])})"
    )
