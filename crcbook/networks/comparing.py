r"""Holding the network that was read against the model itself.

A reader knows what a module computes from its type alone, and Python offers many ways to compute
something else under the same type. So the model is evaluated: on a float64 copy of it, where a
difference of a few roundings counts, and as it is, in its own precision. Two evaluations of one
function in floating point differ by no more than the sum of their rounding errors, which are
bounded here entry by entry; what differs by more is another function.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from crcbook.activations import Activation
from crcbook.networks.affine import Affine
from crcbook.networks.network import Network
from crcbook.networks.operations import Head

_MOST_INPUTS = 64  # of those given, evenly spaced
_SCALES, _EACH = (1e-2, 1.0, 1e1, 1e3), 4  # random points: from flat to saturated activations
_DOUBLE = torch.finfo(torch.float64).eps / 2
_SINGLE = torch.finfo(torch.float32).eps / 2
_TENSOR_CORES = 2.0**-11  # float32 factors are rounded to this where torch lets them be
_ROUNDINGS = 32  # of an activation and what surrounds it; twice what the table of them is tested to


def check_modes() -> None:
    """Refuse contexts of torch that change what operations compute.

    Raises:
        RuntimeError: inside such a context, ``torch.device`` and the gradient modes excepted.
    """
    modes = chain(_get_current_function_mode_stack(), _get_current_dispatch_mode_stack())
    for mode in modes:
        if type(mode) is not DeviceContext:
            raise RuntimeError(
                f"{type(mode).__name__} may change what torch computes: leave it first"
            )


@dataclass(frozen=True)
class Segment:
    """The affine steps up to an activation, and the activation.

    Attributes:
        steps: the affine steps.
        shape: of an item that the first one takes.
        after: the shape of an item that the last one gives.
        activation: the identity for the logits.
    """

    steps: tuple[Affine, ...]
    shape: tuple[int, ...]
    after: tuple[int, ...]
    activation: Activation


@dataclass(frozen=True)
class Reading:
    """A network, and what it was read from.

    Attributes:
        network: what was read, in float64.
        segments: the affine steps and activations that it was read from, a layer each.
        heads: what follows the logits.
    """

    network: Network
    segments: Sequence[Segment]
    heads: Sequence[Head]


def points_for(shape: Sequence[int], at: Tensor | None) -> Tensor:
    """Points to compare at.

    Args:
        shape: of an input.
        at: ``(batch, *input_shape)`` inputs; None for none.

    Returns:
        ``(points, *shape)`` float64 random points and some of the inputs, on the CPU.
    """
    generator, size = torch.Generator("cpu").manual_seed(0), torch.Size(shape).numel()
    drawn = torch.empty(len(_SCALES), _EACH, size, dtype=torch.float64, device="cpu")
    drawn.normal_(generator=generator)
    parts = [scale * part for scale, part in zip(_SCALES, drawn, strict=True)]
    if at is not None and at[0].numel() == size:
        step = -(-len(at) // _MOST_INPUTS)
        given = at.detach()[::step].flatten(1).to("cpu", torch.float64)
        parts.append(given[given.isfinite().all(1)])
    return torch.cat(parts).reshape(-1, *shape)


def in_double(model: nn.Module, points: Tensor) -> tuple[nn.Module, Tensor] | None:
    """A float64 copy of a model; None where it cannot be copied, or not be evaluated.

    Args:
        model: the model.
        points: ``(points, *shape)`` float64 inputs to evaluate it at.

    Returns:
        The copy, on the model's device, or on the CPU where that device has no float64; and what it
        gives.
    """
    try:
        # What a hook makes of the weights, such as torch's older weight_norm, cannot be copied.
        made = (v for module in model.modules() for v in vars(module).values())
        made = (v for v in made if isinstance(v, Tensor) and not v.is_leaf)
        twin = copy.deepcopy(model, {id(v): v.detach().clone() for v in made})
        twin = (twin.cpu() if device_of(model).type == "mps" else twin).double()
        return twin, evaluated(twin, points.to(device_of(twin)))
    except Exception:  # whatever a module raises that someone wrote for another dtype
        return None


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are.

    Args:
        model: the model.

    Returns:
        The device of the first of them.
    """
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def compare(reading: Reading, answers: Sequence[tuple[Tensor, Tensor]], points: Tensor) -> None:
    """Check that a model computes what the network read from it does.

    Args:
        reading: the network, and what it was read from.
        answers: what the model gives, and its float64 copy; each with a tensor of the dtype and on
            the device of that evaluation.
        points: ``(points, *shape)`` float64 inputs at which they were evaluated, on the CPU.

    Raises:
        ValueError: where one differs from the network by more than rounding, or nothing could be
            compared.
    """
    expected, allowances = _expected(reading, points, [like for _, like in answers])
    if not any(allowed.isfinite().all(1).any() for allowed in allowances):
        raise ValueError(
            "the model cannot be compared with what was read from it: its dtype overflows at every "
            "point tried. A float32 or float64 copy, model.float(), can be read"
        )
    for (logits, _), allowed in zip(answers, allowances, strict=True):
        logits = logits.to(expected).reshape(len(points), -1)
        if logits.shape != expected.shape:
            raise ValueError(
                f"the model gives {tuple(logits.shape)} for {len(points)} inputs, and the network "
                f"read from it {tuple(expected.shape)}: it cannot be certified"
            )
        gap = (logits - expected).abs()
        wrong = ~(gap <= allowed) & allowed.isfinite()
        if wrong.any():
            found, explained = float(gap[wrong].max()), float(allowed[wrong].max())
            raise ValueError(
                "the model computes something else than what was read from it: logits differ by "
                f"{found:.3g}, where rounding explains {explained:.3g}. Is it in training mode, "
                "does it look at how many inputs it is given, or does something (a patched "
                "method, a module or a tensor with operations of its own) change its forward pass?"
            )


def evaluated(model: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """What a model gives.

    Args:
        model: the model.
        points: ``(points, *shape)``, which are left as they are.

    Returns:
        Its output.

    Raises:
        ValueError: where the model fails, or gives no plain tensor.
    """
    try:
        with torch.no_grad():
            logits = model(points.clone())  # some work in place
    except Exception as error:
        raise ValueError(
            f"the model cannot be evaluated on {points.dtype} inputs of shape "
            f"{tuple(points.shape)}: {error}"
        ) from error
    if type(logits) is not Tensor:
        raise ValueError(f"the model must give a tensor of logits; got {type(logits).__name__}")
    return logits


def _expected(reading: Reading, x: Tensor, likes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    r"""What the network gives, and how far other evaluations of the model can be off.

    A step's image of something within e of a, entry by entry, is within :math:`|A|e` of that of a,
    and rounding adds :math:`\rho|A||a|`, with :math:`\rho` the relative error of a sum of so many
    products. An activation of slope at most g is within g times that and a few roundings.

    Args:
        reading: the network, and the steps that the model takes.
        x: ``(points, *shape)`` float64, on the CPU.
        likes: a tensor each of the dtype and on the device of the other evaluations.

    Returns:
        ``(points, outputs)`` float64 values, and for each evaluation the differences allowed;
        infinite where its dtype may overflow.
    """
    evaluations = [_Evaluation.of(like, x) for like in likes]
    for layer, segment in zip(reading.network.layers, reading.segments, strict=True):
        size, length = x.abs(), x.flatten(1).norm(dim=1)
        for step in segment.steps:
            size = step.magnitude(size)
            size = size if step.shift is None else size + step.shift.abs()
            evaluations = [evaluation.after(step, size) for evaluation in evaluations]
        z = torch.addmm(layer.bias, x.flatten(1).to(layer.bias), layer.weight.T).cpu()
        # The evaluation of the dense layer, and what it is off by.
        dense = 2 * _DOUBLE * (layer.weight.shape[1] + 2) * size.flatten(1)
        dense = dense + (layer.weight_error * length + layer.bias_error)[:, None]
        evaluations = [each.activated(layer.activation, z, dense) for each in evaluations]
        x = layer.activation.value(z).reshape(len(x), *segment.after)
        evaluations = [replace(each, error=each.error.reshape(x.shape)) for each in evaluations]
    allowed = [each.error for each in evaluations]
    for head in reading.heads:  # none of them is steeper than 2 in the largest entry
        x = head.value(x)
        rounded = [_ROUNDINGS * torch.finfo(like.dtype).eps * (1 + x.abs()) for like in likes]
        if head.name in ("log_softmax", "logsigmoid"):
            # As the logarithm of what may underflow, of which some programs make minus infinity.
            rounded = [
                torch.where(x < math.log(torch.finfo(like.dtype).tiny) + 1, torch.inf, more)
                for like, more in zip(likes, rounded, strict=True)
            ]
        allowed = [
            2 * error.amax(1, keepdim=True) + more
            for error, more in zip(allowed, rounded, strict=True)
        ]
    fits = [each.fits[:, None] for each in evaluations]
    return x, [
        torch.where(fit, 4 * error, torch.inf) for fit, error in zip(fits, allowed, strict=True)
    ]


@dataclass(frozen=True)
class _Evaluation:
    """How far another evaluation can be off, on its way through the model.

    Attributes:
        like: a tensor of its dtype, on its device.
        error: bounds of the errors of all entries; of shape () at the inputs, which are exact.
        fits: ``(points,)`` bool, where its dtype holds all numbers so far.
    """

    like: Tensor
    error: Tensor
    fits: Tensor

    @classmethod
    def of(cls, like: Tensor, x: Tensor) -> "_Evaluation":
        """At the inputs."""
        fits = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return cls(like, x.new_zeros(()), fits)

    def after(self, step: Affine, size: Tensor) -> "_Evaluation":
        """After a step, given the sums of the magnitudes of the true numbers there."""
        info, error = torch.finfo(self.like.dtype), self.error
        error = step.magnitude(error) if error.dim() else error
        size = size + 2 * error
        if step.terms or step.shift is not None:
            error = error + 2 * _relative(step.terms, self.like) * size + step.terms * info.tiny
        fits = self.fits & (size.reshape(len(size), -1).amax(1) < info.max / 4)
        return replace(self, error=error, fits=fits)

    def activated(self, row: Activation, z: Tensor, dense: Tensor) -> "_Evaluation":
        """After an activation, given the network's preactivations and bounds of their errors."""
        info = torch.finfo(self.like.dtype)
        eps = info.eps
        error = (self.error.flatten(1) if self.error.dim() else self.error) + dense
        scale = row.max_slope * (z.abs() + 2 * error) + row.at_zero
        # A straight line in place of the curve, from where one evaluation may take it.
        jump = z + 2 * error + _ROUNDINGS * eps * z.abs() >= row.deviates_from
        curved = z - 2 * error <= row.deviates_from
        over = curved & (row.exponent * (z + 2 * error) > math.log(info.max))
        error = row.max_slope * error + _ROUNDINGS * eps * scale + row.deviation * jump
        return replace(self, error=error, fits=self.fits & ~over.any(1))


def _relative(terms: int, like: Tensor) -> float:
    """The relative error of an inner product, to first order."""
    if like.dtype == torch.float64:
        return (terms + 2) * _DOUBLE
    if like.dtype != torch.float32:
        return (terms + 4) * torch.finfo(like.dtype).eps
    exact = like.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return (terms + 2) * _SINGLE + (0 if exact else 4 * _TENSOR_CORES)
