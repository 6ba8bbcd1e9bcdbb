"""Networks in ONNX files, as modules of torch.

The ``onnx`` package reads the file, which is data: a list of operations with their constants. Each
operation becomes one of torch's, and the module is then read as any other. What comes out is held
against the reference evaluation that ``onnx`` brings along. An activation that an exporter wrote
out is read as the activation itself, whose constants the file holds as float32 rounds them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

# Operations of constants alone that exporters leave in a file, most of them about shapes.
_FOLDED = {
    *("Abs", "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Exp", "Expand", "Floor"),
    *("Gather", "Identity", "MatMul", "Mod", "Mul", "Neg", "Pow", "Range", "Reciprocal", "Reshape"),
    *("Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tile", "Transpose"),
    *("Unsqueeze", "Where", "ReduceMean", "ReduceProd", "ReduceSum"),
}
_CORNERS = {
    *("Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Selu", "Clip", "HardSwish", "HardSigmoid"),
    *("MaxPool", "GlobalMaxPool", "Max", "Min", "Abs", "Shrink"),
}
# The operator set that older files are converted to: from here on the reference evaluation of a
# BatchNormalization takes the statistics that it keeps.
_OLDEST = 14
_ALL = 2**31 - 1  # the end of a slice that takes everything
_STRAIGHT = 40.0  # from here on softplus is the identity in float64
_ROUNDED = 2.0**-24 * (1 + 2.0**-10)  # float32's relative rounding, and that of what is done to it


@dataclass(frozen=True)
class Node:
    """An operation.

    Attributes:
        kind: its name in ONNX.
        inputs: the names of what it takes; empty for an argument left out.
        outputs: the names of what it gives.
        attributes: its settings.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict


class OnnxNetwork(nn.Module):
    """The operations of an ONNX file, in order.

    Attributes:
        input_shape: of one input.
        batch: how many inputs the file takes at a time; 1 where it takes any number.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        constants: dict[str, Tensor],
        ends: tuple[str, str],
        input_shape: tuple[int, ...],
        batch: int = 1,
    ) -> None:
        """Keep the operations and their constants.

        Args:
            nodes: the operations.
            constants: the file's tensors by name.
            ends: the names of the input and the output.
            input_shape: of one input.
            batch: how many inputs the file takes at a time.

        Raises:
            ValueError: for an operation that is not read.
        """
        super().__init__()
        unknown = sorted({node.kind for node in nodes} - set(_OPERATIONS))
        if unknown:
            more = " GELU is one operation from opset 20 on." if "Erf" in unknown else ""
            if corners := ", ".join(kind for kind in unknown if kind in _CORNERS):
                more += (
                    f" {corners} has corners, where curvature is not bounded: use a smooth "
                    "activation such as softplus, and average pooling."
                )
            raise ValueError(
                f"the ONNX operations {', '.join(unknown)} are not read.{more} Those that are: "
                f"{', '.join(sorted(_OPERATIONS))}"
            )
        self.nodes, self.ends = tuple(nodes), ends
        self.input_shape, self.batch = input_shape, batch
        self.names = tuple(constants)
        for place, constant in enumerate(constants.values()):
            self.register_buffer(f"constant_{place}", constant)

    @property
    def kinds(self) -> list[str]:
        """The names of the operations, in order."""
        return [node.kind for node in self.nodes]

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the operations.

        Args:
            x: ``(batch, *input_shape)``.

        Returns:
            ``(batch, classes)``.
        """
        values = {name: getattr(self, f"constant_{i}") for i, name in enumerate(self.names)}
        values[self.ends[0]] = x
        for node in self.nodes:
            inputs: list[Any] = [values[name] if name else None for name in node.inputs]
            if node.kind == "Reshape":
                inputs[1] = _free_batch(inputs[1], self.batch)
            settings = dict(node.attributes)
            if node.kind == "Split" and len(inputs) < 2:
                settings["num_outputs"] = len(node.outputs)
            made = _OPERATIONS[node.kind](*inputs, **settings)
            values |= zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False)
        return values[self.ends[1]]


def load_onnx(path: Path) -> OnnxNetwork:
    """Read a network from an ONNX file.

    Args:
        path: the file.

    Returns:
        The network, on the CPU.

    Raises:
        ImportError: without the ``onnx`` package.
        RuntimeError: where the file is missing, damaged or no ONNX file.
        ValueError: for operations that are not read, or a network that cannot be certified.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("ONNX files need one more package: pip install onnx") from error
    try:
        file = onnx.load(path)
    except Exception as error:  # protobuf's own, of several kinds
        raise RuntimeError(
            f"cannot read {path} as an ONNX file ({error}): copy or export it again"
        ) from error
    if not file.graph.node:  # some other files pass for one without any operation
        raise RuntimeError(f"cannot read {path} as an ONNX file: it holds no operations; export it")
    file = _converted(file, onnx)
    try:
        network = _network(file, onnx)
        _check(network, file)
    except (ValueError, RuntimeError):
        raise
    except Exception as error:  # what onnx, NumPy or torch make of what they do not know
        raise ValueError(
            f"{path} cannot be read ({error}): export it with operator set {_OLDEST} or a newer "
            "one, float weights and no control flow"
        ) from error
    return network


def _converted(file, onnx):
    """A file of an older operator set as one of ``_OLDEST``, as onnx's own converter makes it."""
    own = [one.version for one in file.opset_import if one.domain in ("", "ai.onnx")]
    if not own or min(own) >= _OLDEST:
        return file
    try:
        return onnx.version_converter.convert_version(file, _OLDEST)
    except Exception:  # what the converter does not know may be read as it is
        return file


def _network(file, onnx) -> OnnxNetwork:
    from onnx.reference import ReferenceEvaluator

    def tensor(value) -> Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(value).copy())

    def setting(attribute):
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            return tensor(value)
        return value.decode() if isinstance(value, bytes) else value

    graph = file.graph
    constants = {value.name: tensor(value) for value in graph.initializer}
    nodes = []
    for node in graph.node:
        settings = {attribute.name: setting(attribute) for attribute in node.attribute}
        if node.op_type == "Constant" and len(settings) == 1:
            (value,) = settings.values()
            constants[node.output[0]] = torch.as_tensor(value)
        elif node.op_type in _FOLDED and all(name in constants or not name for name in node.input):
            given = {name: constants[name].numpy() for name in node.input if name}
            made = ReferenceEvaluator(_alone(node, given, file, onnx)).run(None, given)
            constants |= zip(
                node.output, map(torch.from_numpy, map(numpy.array, made)), strict=True
            )
        else:
            nodes.append(Node(node.op_type, tuple(node.input), tuple(node.output), settings))
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise ValueError(
            f"the network must have one input and one output; it has {len(inputs)} and "
            f"{len(graph.output)}"
        )
    sizes = [size.dim_value for size in inputs[0].type.tensor_type.shape.dim]
    batch, shape = max(1, *sizes[:1]), tuple(sizes[1:])
    if not shape or 0 in shape:
        raise ValueError(f"the input must be (batch, *input_shape); its sizes are {shape}")
    ends = inputs[0].name, graph.output[0].name
    return OnnxNetwork(_fused(nodes, constants, ends[1]), constants, ends, shape, batch)


def _alone(node, given: dict[str, numpy.ndarray], file, onnx):
    """An operation on constants as a model of its own, of the file's operator set."""
    helper = onnx.helper
    takes = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in given.items()
    ]
    gives = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "constants", takes, gives)
    return helper.make_model(graph, opset_imports=file.opset_import, ir_version=file.ir_version)


@dataclass(frozen=True)
class _Graph:
    """Operations by what they give, to see what an exporter wrote out.

    Attributes:
        made: the operation that gives a value.
        constants: the file's tensors by name.
    """

    made: dict[str, Node]
    constants: dict[str, Tensor]

    def parts(self, name: str | None, kind: str) -> tuple:
        """What an operation of this kind takes that gives a value; Nones where another does."""
        node = self.made.get(name or "")
        return node.inputs if node is not None and node.kind == kind else (None, None)

    def pairs(self, name: str | None, kind: str) -> tuple[tuple, tuple]:
        """The same in either order."""
        first, second = self.parts(name, kind)
        return (first, second), (second, first)

    def number(self, name: str | None) -> float | None:
        """A constant that is one number."""
        constant = self.constants.get(name or "")
        return None if constant is None or constant.numel() != 1 else constant.item()

    def product(self, name: str, x: str = "", deep: int = 4) -> tuple[float, list[str]]:
        """A value as a number times other values, by name; x is not taken apart."""
        if (number := self.number(name)) is not None:
            return number, []
        node = self.made.get(name)
        if node is None or name == x or deep == 0:
            return 1.0, [name]
        if node.kind == "Pow" and self.number(node.inputs[1]) == 3:
            return 1.0, [node.inputs[0]] * 3
        divisor = self.number(node.inputs[1]) if node.kind == "Div" else None
        if node.kind != "Mul" and not divisor:
            return 1.0, [name]
        first, of_first = self.product(node.inputs[0], x, deep - 1)
        if divisor:
            return first / divisor, of_first
        second, of_second = self.product(node.inputs[1], x, deep - 1)
        return first * second, of_first + of_second


def _fused(nodes: Sequence[Node], constants: dict[str, Tensor], end: str) -> list[Node]:
    """The operations that lead to the output, with activations that were written out made one."""
    graph = _Graph({node.outputs[0]: node for node in nodes}, constants)
    nodes, needed, kept = [_activation(node, graph) for node in nodes], {end}, []
    for node in reversed(nodes):
        if needed & set(node.outputs):
            needed |= set(node.inputs)
            kept.append(node)
    return kept[::-1]


def _activation(node: Node, graph: _Graph) -> Node:
    """The activation that ends in an operation, where it was written out; else the operation."""
    kind, inputs = node.kind, node.inputs
    settings: dict[str, float | str] = {}
    for x, form in _gelus(node.outputs[0], graph):
        kind, inputs, settings = "Gelu", (x,), {"approximate": form}
    if kind == "Div":  # x / (|x| + 1)
        size, one = graph.parts(inputs[1], "Add")
        if graph.number(one) == 1 and graph.parts(size, "Abs")[0] == inputs[0]:
            kind, inputs = "Softsign", inputs[:1]
    elif kind == "Log":
        (x, *_) = graph.parts(inputs[0], "Sigmoid")
        if x is not None:
            kind, inputs = "LogSigmoid", (x,)
    elif kind == "Mul":
        for x, curved in (inputs, inputs[::-1]):  # x tanh(softplus(x))
            if graph.parts(graph.parts(curved, "Tanh")[0], "Softplus")[0] == x:
                kind, inputs = "Mish", (x,)
    elif kind == "Where":  # x where beta x is above a threshold, else softplus(beta x) / beta
        test, x, curved = inputs
        scaled, threshold = graph.parts(test, "Greater")
        beta: float | None = 1.0
        if scaled != x:
            factor, name = graph.parts(scaled, "Mul")
            curved, divisor = graph.parts(curved, "Div")
            beta = graph.number(name)
            beta = beta if factor == x and beta == graph.number(divisor) else None
        bound = graph.number(threshold)
        if beta and bound is not None and graph.parts(curved, "Softplus")[0] == scaled:
            kind, inputs, settings = "Softplus", (x,), {"beta": beta, "threshold": bound}
    return node if kind == node.kind else Node(kind, inputs, node.outputs, settings)


def _gelus(name: str, graph: _Graph) -> Iterator[tuple[str, str]]:
    """What a value is a GELU of, and of which form, where it is one: ``x/2 (1 + curve)``."""
    for term in graph.product(name)[1]:
        for one, curve in graph.pairs(term, "Add"):
            inner = graph.parts(curve, "Erf")[0], graph.parts(curve, "Tanh")[0]
            found = [(x, "none") for x in _within_erf(inner[0], graph)]
            found += [(x, "tanh") for x in _within_tanh(inner[1], graph)]
            for x, form in found:
                half, rest = graph.product(name, x)
                if graph.number(one) == 1 and half == 0.5 and sorted(rest) == sorted([x, term]):
                    yield x, form


def _within_erf(name: str | None, graph: _Graph) -> Iterator[str]:
    """The x of x / sqrt(2)."""
    for x in (*graph.pairs(name, "Mul")[0], *graph.pairs(name, "Div")[0]):
        factor, rest = graph.product(name or "", x or "")
        if x and rest == [x] and _is(factor, math.sqrt(0.5)):
            yield x


def _within_tanh(name: str | None, graph: _Graph) -> Iterator[str]:
    """The x of sqrt(2 / pi) (x + 0.044715 x^3)."""
    factor, rest = graph.product(name or "")
    for x, cubic in graph.pairs(rest[0], "Add") if len(rest) == 1 else ():
        if x is not None and _is(factor, math.sqrt(2 / math.pi)):
            small, cube = graph.product(cubic, x)
            if cube == [x] * 3 and _is(small, 0.044715):
                yield x


def _is(number: float, constant: float) -> bool:
    """Whether a number is a constant as float32 rounds it, or closer.

    An activation's own float32 evaluation rounds it in the same way.
    """
    return abs(number / constant - 1) <= _ROUNDED


def _check(network: OnnxNetwork, file) -> None:
    """Hold what is read from the network against ONNX's own reference evaluation."""
    from onnx.reference import ReferenceEvaluator

    from crcbook.networks.reading import compare_with

    evaluator = ReferenceEvaluator(_without_underflow(file, network))

    def reference(x: Tensor) -> Tensor:  # each by itself: a file may fix the batch
        with numpy.errstate(all="ignore"):  # its sigmoid evaluates both of its branches
            batches = [item.expand(network.batch, *item.shape).numpy() for item in x]
            one = [next(iter(evaluator.run(None, {network.ends[0]: b})))[:1] for b in batches]
        return torch.from_numpy(numpy.concatenate(one))

    compare_with(reference, network)


def _without_underflow(file, network: OnnxNetwork):
    """The file with log(sigmoid(x)) as -softplus(-x).

    In float32 the sigmoid of what is far below 0 is 0, or loses digits, and so does its logarithm.
    """
    from onnx.helper import make_node

    inputs = {
        node.outputs[0]: node.inputs[0] for node in network.nodes if node.kind == "LogSigmoid"
    }
    nodes = []
    for node in file.graph.node:
        y = node.output[0]
        if node.op_type != "Log" or y not in inputs:
            nodes.append(node)
            continue
        names = [inputs[y], f"{y} negated", f"{y} softplus", y]
        kinds = "Neg", "Softplus", "Neg"
        nodes += [make_node(kinds[i], [names[i]], [names[i + 1]]) for i in range(3)]
    del file.graph.node[:]
    file.graph.node.extend(nodes)
    return file


def _reshape(x: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())]
    # A file that fixes a batch of one means one item after the other.
    fixed = sizes[:1] == [1] and len(x) != 1 and x.dim() > 1
    return x.reshape([len(x), *sizes[1:]] if fixed else sizes)


def _free_batch(shape: Tensor, batch: int) -> Tensor:
    """A shape that begins with the batch that the file was written for, with 1 in its place."""
    fixed = batch > 1 and len(shape) > 1 and int(shape[0]) == batch
    return torch.cat([torch.ones_like(shape[:1]), shape[1:]]) if fixed else shape


def _gemm(a, b, c=None, **settings) -> Tensor:
    if settings.get("transA", 0):
        raise ValueError("Gemm is read for inputs that are not transposed")
    alpha, beta = settings.get("alpha", 1.0), settings.get("beta", 1.0)
    weight = b if settings.get("transB", 0) else b.T
    result = functional.linear(a, weight if alpha == 1 else alpha * weight)
    return result if c is None else result + (c if beta == 1 else beta * c)


def _sides(pads: Sequence[int]) -> list[int]:
    """ONNX's ``(starts, ends)`` as torch's pairs, last dimension first."""
    half = len(pads) // 2
    return [pads[i + side] for i in reversed(range(half)) for side in (0, half)]


def _pads(x: Tensor, kernel: Sequence[int], settings: dict) -> list[int]:
    """The pads of a convolution or a pool, starts before ends; those of TensorFlow are counted."""
    count, kind = len(kernel), settings.get("auto_pad", "NOTSET")
    given = list(settings.get("pads", ())) or [0] * 2 * count
    if kind not in ("SAME_UPPER", "SAME_LOWER"):
        return given
    ones = [1] * count
    strides, dilations = settings.get("strides", ones), settings.get("dilations", ones)
    totals = [
        max(0, (-(-size // stride) - 1) * stride + (length - 1) * dilation + 1 - size)
        for size, length, stride, dilation in zip(
            x.shape[2:], kernel, strides, dilations, strict=True
        )
    ]
    more = int(kind == "SAME_LOWER")
    starts = [(total + more) // 2 for total in totals]
    return starts + [total - start for total, start in zip(totals, starts, strict=True)]


def _conv(x, weight, bias=None, **settings) -> Tensor:
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
    names = ("strides", 1), ("dilations", 1), ("group", 1)
    strides, dilations, groups = (settings.get(name, default) for name, default in names)
    pads = _pads(x, weight.shape[2:], settings)
    x = functional.pad(x, _sides(pads)) if any(pads) else x
    return function(x, weight, bias, strides, 0, dilations, groups)


def _conv_transpose(x, weight, bias=None, **settings) -> Tensor:
    places = weight.dim() - 3
    function = (
        functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d
    )[places]  # fmt: skip
    names = ("strides", 1), ("output_padding", 0), ("group", 1), ("dilations", 1)
    stride, more, groups, dilation = (settings.get(name, default) for name, default in names)
    if settings.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError(f"ConvTranspose is read with pads, not with {settings['auto_pad']}")
    pads = _symmetric("ConvTranspose", list(settings.get("pads", ())) or [0] * 2 * (places + 1))
    if settings.get("output_shape"):
        raise ValueError("ConvTranspose is read with pads, not with output_shape")
    return function(x, weight, bias, stride, pads, more, groups, dilation)


def _symmetric(kind: str, pads: list[int]) -> list[int]:
    """Pads that are the same on both sides, once."""
    count = len(pads) // 2
    if pads[:count] != pads[count:]:
        raise ValueError(f"{kind} is read with the same pads on both sides; got {pads}")
    return pads[:count]


def _average_pool(x, kernel_shape, **settings) -> Tensor:
    if any(d != 1 for d in settings.get("dilations", ())):
        raise ValueError("AveragePool is read without dilations")
    pools = functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d
    pads = _symmetric("AveragePool", _pads(x, kernel_shape, settings))
    strides = settings.get("strides") or [1] * len(kernel_shape)
    up, padded = bool(settings.get("ceil_mode", 0)), bool(settings.get("count_include_pad", 0))
    return pools[len(kernel_shape) - 1](x, kernel_shape, strides, pads, up, padded)


def _slice(x, starts, ends, axes=None, steps=None) -> Tensor:
    """ONNX's slices, whose steps may be negative."""
    if axes is not None and len(starts) > len(axes):
        raise ValueError("Slice is read with an axis for each of its starts")
    whole = range(len(starts))
    places = [*whole] if axes is None else _axes(axes)
    for i in whole:
        axis, step = places[i] % x.dim(), 1 if steps is None else int(steps[i])
        if axis == 0 and (int(starts[i]), step) == (0, 1) and int(ends[i]) >= _ALL:
            continue  # of all items
        kept = [*range(x.shape[axis])[slice(int(starts[i]), int(ends[i]), step)]]
        if step < 0:
            x, kept = x.flip(axis), [x.shape[axis] - 1 - place for place in kept]
        first, last = (kept[0], kept[-1] + 1) if kept else (0, 0)
        x = x[(slice(None),) * axis + (slice(first, last, abs(step)),)]
    return x


def _depth_to_space(x, blocksize, mode="DCR") -> Tensor:
    if mode == "DCR":
        x = x.unflatten(1, (blocksize * blocksize, -1)).transpose(1, 2).flatten(1, 2)
    return functional.pixel_shuffle(x, blocksize)


def _reduced(function, x, axes=None, keepdims=1, noop_with_empty_axes=0) -> Tensor:
    """A sum or a mean over some axes."""
    places = _axes(axes)
    if not places and noop_with_empty_axes:
        return x
    return function(x, places, keepdim=bool(keepdims))


def _running_total(x, axis, exclusive=0, reverse=0) -> Tensor:
    if exclusive or reverse:
        raise ValueError("CumSum is read from the first entry to the last, that one included")
    return x.cumsum(int(axis))


def _split(x, sizes=None, axis=0, num_outputs=1, split=None) -> tuple[Tensor, ...]:
    sizes = split if sizes is None else sizes
    if sizes is None:  # equal ones, and a smaller last one
        whole, most = x.shape[axis], -(-x.shape[axis] // num_outputs)
        sizes = [min(most, whole - most * i) for i in range(num_outputs)]
        if min(sizes) < 1:
            raise ValueError(f"Split cannot make {num_outputs} parts of {whole} entries")
    return x.split(sizes.tolist() if isinstance(sizes, Tensor) else list(sizes), axis)


def _axes(axes) -> list[int]:
    return axes.tolist() if isinstance(axes, Tensor) else list(axes or ())


def _gather(x, index, axis=0) -> Tensor:
    if index.dim() == 0:
        return x.select(axis, int(index))
    places = torch.where(index < 0, index + x.shape[axis], index).flatten()
    found = x.index_select(axis, places)
    return found if index.dim() == 1 else found.unflatten(axis, tuple(index.shape))


def _resize(x, roi=None, scales=None, sizes=None, **settings) -> Tensor:
    """Nearest neighbours, where each entry is repeated a whole number of times."""
    if scales is None or scales.numel() == 0:
        if sizes is None:
            raise ValueError("Resize is read with scales or sizes")
        factors = [int(size) / old for size, old in zip(sizes[2:], x.shape[2:], strict=True)]
    else:
        factors = [float(scale) for scale in scales[2:]]
    mode = settings.get("mode", "nearest")
    places = settings.get("coordinate_transformation_mode", "half_pixel")
    nearest = settings.get("nearest_mode", "round_prefer_floor")
    # Where a middle of a repeated entry is never half way between two, or the first is taken.
    repeats = (places in ("half_pixel", "pytorch_half_pixel") and "round" in nearest) or (
        (places, nearest) == ("asymmetric", "floor")
    )
    if mode != "nearest" or not repeats or any(factor != int(factor) for factor in factors):
        raise ValueError("Resize is read for nearest neighbours and whole factors")
    for axis, factor in enumerate(factors, start=2):
        x = x.repeat_interleave(int(factor), axis)
    return x


def _dropout(x, ratio=None, training_mode=None, **_) -> Tensor:
    if training_mode is not None and bool(training_mode):
        raise ValueError("Dropout draws at random: export the model in eval mode")
    return x


def _squeeze(x, axes=None) -> Tensor:
    if axes is None:
        raise ValueError("Squeeze is read with axes: without them it may take the batch")
    for axis in sorted((axis % x.dim() for axis in _axes(axes)), reverse=True):
        x = x.squeeze(axis)
    return x


def _unsqueeze(x, axes) -> Tensor:
    places = _axes(axes)
    for axis in sorted(axis % (x.dim() + len(places)) for axis in places):
        x = x.unsqueeze(axis)
    return x


def _pad(x, pads, value=None, axes=None, mode="constant") -> Tensor:
    if axes is not None:
        raise ValueError("Pad is read for all axes at once")
    value = 0.0 if value is None else float(value)
    pads = _sides(_axes(pads))
    least = 0 if mode == "constant" else 2 * (x.dim() - 2)  # what torch wants to be named
    while len(pads) > least and pads[-2:] == [0, 0]:
        pads = pads[:-2]
    mode = {"edge": "replicate", "wrap": "circular"}.get(mode, mode)
    return functional.pad(x, pads, mode, value if mode == "constant" else None)


def _batch_norm(x, scale, bias, mean, variance, **settings) -> Tensor:
    training, epsilon = bool(settings.get("training_mode", 0)), settings.get("epsilon", 1e-5)
    return functional.batch_norm(x, mean, variance, scale, bias, training, 0, epsilon)


_OPERATIONS: dict[str, Callable] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Neg": torch.neg,
    "MatMul": torch.matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "ReduceMean": partial(_reduced, torch.mean),
    "ReduceSum": partial(_reduced, torch.sum),
    "Sum": lambda *parts: sum(parts[1:], parts[0]),
    "Slice": _slice,
    "Tile": lambda x, repeats: x.repeat(repeats.tolist()),
    "CumSum": _running_total,
    "Split": _split,
    "DepthToSpace": _depth_to_space,
    "Resize": _resize,
    "BatchNormalization": _batch_norm,
    "Pad": _pad,
    "Identity": lambda x: x,
    "Dropout": _dropout,
    "Cast": lambda x, to, **_: x,
    "Flatten": lambda x, axis=1: x.flatten(axis),
    "Reshape": _reshape,
    "Transpose": lambda x, perm=None: x.permute(perm or list(range(x.dim()))[::-1]),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Shape": lambda x: torch.tensor(x.shape),
    "Gather": _gather,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Atan": torch.atan,
    "Softplus": lambda x, beta=1.0, threshold=_STRAIGHT: functional.softplus(x, beta, threshold),
    "Softsign": functional.softsign,
    "Elu": lambda x, alpha=1.0: functional.elu(x, alpha),
    "Celu": lambda x, alpha=1.0: functional.celu(x, alpha),
    "Gelu": lambda x, approximate="none": functional.gelu(x, approximate=approximate),
    "Mish": functional.mish,
    "LogSigmoid": functional.logsigmoid,
    "Relu": functional.relu,
    "Softmax": lambda x, axis=-1: functional.softmax(x, axis),
    "LogSoftmax": lambda x, axis=-1: functional.log_softmax(x, axis),
}
