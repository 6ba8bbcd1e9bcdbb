"""Reading a network out of a ``torch.nn`` module, and refusing what cannot be certified."""

import hashlib
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from itertools import chain
from threading import Lock
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from crcbook.activations import IDENTITY, Activation
from crcbook.networks.affine import Affine, compose, shape_after
from crcbook.networks.comparing import (
    Reading,
    Segment,
    check_modes,
    compare,
    evaluated,
    in_double,
    points_for,
)
from crcbook.networks.modules import activation_of
from crcbook.networks.network import Layer, Network
from crcbook.networks.operations import Head, Step, check_plain, name_of
from crcbook.networks.recording import InBatches, Recorded, record

_CALLED = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")  # what a module computes
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_NEVER = {
    nn.MultiheadAttention: "attention multiplies what depends on x by what depends on x, "
    "which is neither an affine map nor an activation",
    nn.RNNBase: "a recurrent network multiplies what depends on x by what depends on x, which is "
    "neither an affine map nor an activation",
    nn.PReLU: "it has a corner, where its curvature is not bounded: use a smooth activation such "
    "as softplus, or the recipe for ReLU in the book's chapter 'Certify your own network'",
}
_INCREASING = ("sigmoid", "logsigmoid")  # at the end, they change no answer
# Where squares and products neither vanish nor overflow, however the proofs arrange them.
_SIZES, _PRODUCTS, _MOST_UNITS = (1e-50, 1e50), (1e-100, 1e100), 200_000
_REMEMBERED_READINGS = 4  # networks, the last ones used: each holds its matrices


def read_network(model: nn.Module, at: Tensor | None = None) -> Network:
    """Read a feed-forward model as a float64 network of dense layers.

    The forward pass is run once on a tensor without numbers that notes what is done to it (see
    :mod:`crcbook.networks.recording`): affine maps and smooth activations, and sums of branches of
    them. Affine maps that follow each other become one layer, and branches go side by side. What
    was read is compared with the model itself, at random points and at the inputs given. A model of
    lower precision is read from a float64 copy: what it computes from its parameters alone, such as
    a weight of spectral norm 1, is taken as float64 computes it. Constants that it makes in the
    dtype of its input, such as the mean of torchvision's ``Normalize``, are read as its own dtype
    rounds them.

    A model with one logit is read as one with two classes: class 0 has the logit 0, and class 1
    that of the model. A softmax, log-softmax, sigmoid or log-sigmoid at the end is left out.

    Args:
        model: the model, in any float dtype, on any device. Compiled and data-parallel ones count
            as what they wrap.
        at: ``(batch, *input_shape)`` inputs at which to compare as well. They tell the shape of an
            input too; without them it is taken from the first layer, which must be a linear one.

    Returns:
        The network with float64 copies of the weights, on the model's device.

    Raises:
        TypeError: where the model is no module.
        ValueError: for operations, shapes or weights that cannot be certified, and for models that
            compute something else than what was read.
        RuntimeError: inside ``torch.autocast`` and other contexts that change what torch computes.
    """
    check_modes()
    model = _unwrapped(model)
    like = _door(model)
    if torch.is_autocast_enabled(like.device.type):
        raise RuntimeError("certificates need full precision: leave torch.autocast first")
    with torch.inference_mode(False), _without_compiler(), unchanged_buffers(model):
        return _read(model, like, at)


def compare_with(reference: Callable[[Tensor], Tensor], model: nn.Module) -> None:
    """Hold what is read from a model against another evaluation of it.

    Args:
        reference: what gives the logits, in float32, of ``(points, *input_shape)``.
        model: the model, which says of which shape its input is.

    Raises:
        ValueError: where the model cannot be certified, or the two differ by more than rounding.
    """
    read_network(model)
    reading, points, _ = _reading(model, _door(model), None)
    like = torch.empty(0, device="cpu")
    logits = evaluated(reference, points.to(like))
    compare(reading, [(logits, like)], points.to(like).double())


def _read(model: nn.Module, like: Tensor, at: Tensor | None) -> Network:
    """Read a model that has passed the door: from its float64 copy, where there is one."""
    reading, points, twin = _reading(model, like, at)
    own = evaluated(model, points.to(like)), like
    if twin is None:
        if like.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                "a model of half precision is compared with what was read from it in float64, and "
                "its float64 copy cannot be evaluated: let it keep the dtype of its input"
            )
        compare(reading, [own], points)
        return reading.network
    copied, logits = twin
    double = torch.empty(0, dtype=torch.float64, device=logits.device)
    try:
        compare(reading, [own, (logits, double)], points)
    except ValueError:
        # What a model makes in the dtype of its input, such as the mean of a Normalize, was read
        # as the model rounds it. The copy rounds it otherwise: it is held against its own reading.
        compare(reading, [own], points)
        shape = tuple(points.shape[1:])
        steps = _ended(record(copied, shape, double))
        compare(_as_read(steps, shape, double), [(logits, double)], points)
    return reading.network


def _reading(
    model: nn.Module, like: Tensor, at: Tensor | None
) -> tuple[Reading, Tensor, tuple[nn.Module, Tensor] | None]:
    """What is read, float64 points of the model's dtype, its float64 copy and what that gives."""
    failed: list[Exception] = []
    for shape in _shapes(model, at):
        points = points_for(shape, at).to(like.dtype).double()
        twin = in_double(model, points) if like.dtype != torch.float64 else None
        # Of the copy, weights that are computed are not rounded. It cannot be recorded where it
        # multiplies them by something that is made in the dtype of the input.
        for candidate in [twin[0], model] if twin else [model]:
            try:
                steps = _ended(record(candidate, shape, like))
            except Exception as error:  # whatever a model of someone else raises
                if candidate is model:
                    failed.append(error)
                continue
            return _as_read(steps, shape, like), points, twin
    if failed:
        raise ValueError(_explained(model, at, failed[0])) from failed[0]
    raise ValueError(
        "the shape of an input cannot be told from the model's first layer: give inputs, as "
        "certify(model, x) and save_model(path, model, at=x) do"
    )


def _as_read(steps: Sequence[Step], shape: tuple[int, ...], like: Tensor) -> Reading:
    segments, heads = _segments(steps, shape)
    return Reading(_built(segments, like), segments, heads)


def as_module(model: Any) -> Any:
    """A model as something to call.

    Args:
        model: a model.

    Returns:
        The module of an exported program, for any number of inputs; anything else as it is.
    """
    return _of_any_batch(
        model.module() if isinstance(model, torch.export.ExportedProgram) else model
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    model = as_module(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted model cannot be read: give the module it was made of")
    while True:
        compiled = type(model).__name__ == "OptimizedModule"
        inner = model._modules.get("_orig_mod" if compiled else "module")
        if inner is None or not (compiled or isinstance(model, _WRAPPERS)):
            return _of_any_batch(model)
        model = inner


def _of_any_batch(model: Any) -> Any:
    """A program that was exported for so many inputs at a time, as one for any number of them."""
    if not isinstance(model, torch.fx.GraphModule):
        return model
    takes = [node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder"]
    if len(takes) != 1 or not isinstance(takes[0], Tensor) or takes[0].dim() < 2:
        return model
    batch, *shape = takes[0].shape
    fixed = all(isinstance(size, int) for size in (batch, *shape))
    return InBatches(model, batch, tuple(shape)) if fixed else model


def _door(model: nn.Module) -> Tensor:
    """Check every tensor that the model holds; returns one of its dtype, on its device."""
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    for name, tensor in tensors.items():
        check_plain(tensor, name)
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None)
        if compiled is not None and not hasattr(compiled, "_torchdynamo_orig_callable"):
            raise ValueError(f"{name or 'the model'} has another call put in place of its own")
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    return floats[0] if floats else torch.zeros(0, device="cpu")


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what an evaluation does to the model, and refuse a model that it does something to.

    Args:
        model: the model.

    Raises:
        ValueError: where its buffers have changed.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        changed = [pair for pair in before if not torch.equal(*pair)]
        for buffer, value in changed:
            with torch.no_grad():
                buffer.copy_(value)
    if changed:
        raise ValueError("the model changes its own buffers in evaluation: call model.eval()")


def _without_compiler() -> AbstractContextManager:
    """A context in which compiled modules run as they were written."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _shapes(model: nn.Module, at: Tensor | None) -> Iterator[tuple[int, ...]]:
    """Shapes of an input to try: as it is, flat, and as a file says."""
    known = getattr(model, "input_shape", None)
    known = known if isinstance(known, tuple) and all(type(n) is int for n in known) else None
    if at is not None:
        if not (isinstance(at, Tensor) and at.is_floating_point()):
            kind = at.dtype if isinstance(at, Tensor) else type(at).__name__
            raise TypeError(f"x must be a floating-point tensor; got {kind}")
        if at.dim() < 2 or at.numel() == 0:
            raise ValueError(
                f"x must be (batch, *input_shape) with at least one item; got {tuple(at.shape)}"
            )
        yield tuple(at.shape[1:])
        if at.dim() > 2:
            yield (at[0].numel(),)
        if known is not None and torch.Size(known).numel() == at[0].numel():
            yield known
        return
    if known is not None:
        yield known
        return
    # What layers multiply with, and not what that is made of where a weight is normalised.
    weights = (getattr(module, "weight", None) for module in model.modules())
    tensors = (tensor for tensor in chain(weights, model.parameters()) if torch.is_tensor(tensor))
    first = next((tensor for tensor in tensors if tensor.dim() > 1), None)
    if first is not None and first.dim() == 2:
        yield (first.shape[1],)


def _explained(model: nn.Module, at: Tensor | None, error: Exception) -> str:
    """What went wrong, in which module, and what the model holds."""
    trace, where = error.__traceback__, model
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        where = owner if isinstance(owner, nn.Module) else where
        trace = trace.tb_next
    text = str(where)
    text = text if len(text) < 100 and "\n" not in text else type(where).__name__
    for module in model.modules():
        for kind, reason in _NEVER.items():
            if isinstance(module, kind):
                return f"cannot certify {type(module).__name__}: {reason}"
    if not isinstance(error, ValueError):
        shape = next(_shapes(model, at))
        return f"the model fails on inputs of shape {shape}, in {text}: {error}"
    held = ", ".join(f"{count} {kind}" for kind, count in Counter(_held(model)).items())
    return f"cannot certify {text}: {error}. The model holds: {held}"


def _held(model: nn.Module) -> Iterator[str]:
    """What a model consists of: the kinds of its modules, or a program's operations."""
    for module in model.modules():
        if isinstance(module, torch.fx.GraphModule):
            called = (node.target for node in module.graph.nodes if node.op == "call_function")
            yield from (name_of(target) for target in called if callable(target))
            return
        if kinds := getattr(module, "kinds", None):  # of an ONNX file
            yield from kinds
        elif not [*module.children()]:
            yield type(module).__name__


def _ended(result: Recorded) -> tuple[Step, ...]:
    """The steps of a model, with two logits where it has one."""
    steps, shape = list(result.steps), tuple(result.shape[1:])
    if len(shape) > 1:
        raise ValueError(
            f"the model must give (batch, classes); got (batch, {', '.join(map(str, shape))})"
        )
    heads: list[Step] = []
    reshapes: list[Step] = []
    while steps and isinstance(steps[-1], Affine) and steps[-1].ordered:
        reshapes.insert(0, steps.pop())
    last = steps[-1] if steps else None
    if isinstance(last, Activation) and last.name in _INCREASING:
        heads.insert(0, Head(last.name, last.value))
        steps.pop()
    elif isinstance(last, Head):
        heads.insert(0, last)
        steps.pop()
    steps += reshapes
    if not any(isinstance(step, Affine) and step.terms for step in steps):
        raise ValueError("the model must have a linear layer that gives the logits")
    if shape in ((), (1,)):
        if isinstance(last, Head):
            raise ValueError("a softmax over one class is 1, whatever the input")
        steps += _with_class_of_zero(shape)
        heads.insert(0, Head("one logit", lambda logits: logits[:, 1:]))
    return (*steps, *heads)


def _with_class_of_zero(shape: tuple[int, ...]) -> list[Affine]:
    def as_column(a: Tensor) -> Tensor:
        return a.reshape(len(a), 1)

    def with_zero(a: Tensor) -> Tensor:
        return functional.pad(a, (1, 0))

    column = Affine("view", as_column, as_column, ordered=True, facts=(shape,))
    return [column, Affine("one logit", with_zero, with_zero)]


def _segments(
    steps: Sequence[Step], shape: tuple[int, ...]
) -> tuple[tuple[Segment, ...], tuple[Head, ...]]:
    segments: list[Segment] = []
    affine: list[Affine] = []
    start = shape
    for step in steps:
        if isinstance(step, Affine):
            affine.append(step)
            shape = tuple(shape_after(step, shape))
        elif isinstance(step, Activation):
            segments.append(Segment(tuple(affine), tuple(start), tuple(shape), step))
            affine, start = [], shape
    segments.append(Segment(tuple(affine), tuple(start), tuple(shape), IDENTITY))
    return tuple(segments), tuple(step for step in steps if isinstance(step, Head))


_memory: OrderedDict[tuple, Network] = OrderedDict()
_lock = Lock()


def _built(segments: Sequence[Segment], like: Tensor) -> Network:
    """The network of dense layers, remembered under the hash of the steps it is made of.

    What is proved of a network is remembered under the hash of its layers themselves.
    """
    device = torch.device("cpu") if like.device.type == "mps" else like.device  # has no float64
    key = _hash((segment.activation, segment.shape, *segment.steps) for segment in segments)
    with _lock:
        found = _memory.get((key, device))
    if found is None:
        layers = tuple(_layer(segment, device) for segment in segments)
        _check_sizes(segments, layers)
        found = Network(layers, _hash(layers))
    with _lock:
        _memory[key, device] = found
        _memory.move_to_end((key, device))
        while len(_memory) > _REMEMBERED_READINGS:
            _memory.popitem(last=False)
    return found


def _layer(segment: Segment, device: torch.device) -> Layer:
    whole = compose(segment.steps, segment.shape)
    weight, bias = whole.weight.to(device), whole.bias.to(device)
    return Layer(weight, bias, segment.activation, whole.weight_error, whole.bias_error)


def _check_sizes(segments: Sequence[Segment], layers: Sequence[Layer]) -> None:
    product = 1.0
    for position, (segment, layer) in enumerate(zip(segments, layers, strict=True)):
        if max(layer.weight.shape) > _MOST_UNITS:
            raise ValueError(f"layers may have at most {_MOST_UNITS} units, and so many inputs")
        facts = [fact for step in segment.steps for fact in step.facts if isinstance(fact, Tensor)]
        for numbers in (layer.weight, layer.bias, *facts):
            least, most = _extent(numbers)
            if least < _SIZES[0] or most > _SIZES[1]:
                raise ValueError(
                    f"linear map {position} must have weights of a size from {_SIZES[0]:g} to "
                    f"{_SIZES[1]:g}, or 0; got {least:g} to {most:g}"
                )
        product *= float(layer.weight.abs().max()) or 1.0
    if not _PRODUCTS[0] <= product <= _PRODUCTS[1]:
        raise ValueError(
            f"the layers' largest weights must have a product from {_PRODUCTS[0]:g} to "
            f"{_PRODUCTS[1]:g}; got {product:g}"
        )


def _extent(numbers: Tensor) -> tuple[float, float]:
    """The least size of a number that is not 0, and the largest."""
    sizes = numbers.abs()
    least = sizes.masked_fill(sizes == 0, torch.inf).min() if sizes.numel() else torch.inf
    return float(least), float(sizes.max()) if sizes.numel() else 0.0


def _hash(facts: Iterable) -> str:
    digest = hashlib.sha256()
    _digest(digest, list(facts))
    return digest.hexdigest()


def _digest(digest: Any, fact: Any) -> None:
    """Add a fact, with its kind and length before it: no two lists of facts read alike."""
    if isinstance(fact, Activation):  # its functions are told apart by its name and settings
        known = (getattr(fact, field.name) for field in fields(fact))
        fact = [value for value in known if not callable(value)]
    elif isinstance(fact, Affine):
        fact = fact.name, fact.facts
    elif isinstance(fact, Layer):
        fact = [getattr(fact, field.name) for field in fields(fact)]
    if isinstance(fact, tuple | list):
        digest.update(f"({len(fact)}:".encode())
        for part in fact:
            _digest(digest, part)
    elif isinstance(fact, Tensor):
        digest.update(f"{fact.dtype} {tuple(fact.shape)}:".encode())
        digest.update(fact.detach().cpu().contiguous().numpy())
    elif isinstance(fact, numpy.ndarray):  # whose repr leaves most of many numbers out
        digest.update(f"{fact.dtype} {fact.shape}:".encode())
        digest.update(fact.tobytes())
    else:
        text = repr(fact).encode()
        digest.update(b"%d:%b" % (len(text), text))


def beside_products(model: nn.Module, network: Network) -> str:
    """What torch, as it runs a model, does beside applying a network's layers one by one.

    Args:
        model: the model.
        network: what was read from it.

    Returns:
        Something that is not one product with a matrix, of the very numbers of the network, and
        its bias and activation; nothing where there is no such thing. What is compiled may
        compute in other ways.
    """
    model = as_module(model)
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            return "what a compiler makes of it"
    model = _unwrapped(model)
    for shape in _shapes(model, torch.empty(1, network.inputs, device="cpu")):
        try:  # not from a float64 copy: what is made of the weights is to be as it is rounded
            steps = _ended(record(model, shape, _door(model)))
        except Exception:  # whatever a model raises for items of another shape
            continue
        segments, heads = _segments(steps, shape)
        if heads:
            return heads[0].name
        if len(segments) != len(network.layers):
            return "something else for flat inputs"
        for segment, layer in zip(segments, network.layers, strict=True):
            if not _is_product(segment, layer):
                others = [s.name for s in segment.steps if not s.ordered and s.matrix is None]
                return ", ".join(dict.fromkeys(others)) or "layers that follow each other as one"
        return ""
    return "what flat inputs do not fit"


def _is_product(segment: Segment, layer: Layer) -> bool:
    maps = [step for step in segment.steps if not step.ordered]
    if len(maps) != 1 or maps[0].matrix is None:
        return False
    weight, bias = layer.weight.cpu(), layer.bias.cpu()
    shift = torch.zeros_like(bias) if maps[0].shift is None else maps[0].shift
    return torch.equal(maps[0].matrix, weight) and torch.equal(shift, bias)


def submodules(model: nn.Module) -> Iterable[nn.Module]:
    """The layers of a plain Sequential of Flatten, Linear and activations, for training.

    Args:
        model: a Sequential, and any nested ones.

    Yields:
        Modules that are no Sequential themselves.

    Raises:
        ValueError: for another module, or one that computes something else than its class says.
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            "a Sequential of Flatten, Linear and activations is needed here (for training); got "
            f"{type(model).__name__}"
        )
    _check_unchanged(model)
    for module in model:
        if isinstance(module, nn.Sequential):
            yield from submodules(module)
            continue
        _check_unchanged(module)
        if type(module) not in (nn.Flatten, nn.Linear) and activation_of(module) is None:
            raise ValueError(
                f"a Sequential of Flatten, Linear and activations is needed here; got {module}"
            )
        yield module


def _check_unchanged(module: nn.Module) -> None:
    kind = nn.Sequential if isinstance(module, nn.Sequential) else type(module)
    changed = any(
        name in vars(module) or getattr(type(module), name) != getattr(kind, name)
        for name in _CALLED
    )
    changed = changed or module._compiled_call_impl is not None
    if changed or module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"{type(module).__name__} computes something else than its layers in turn")
