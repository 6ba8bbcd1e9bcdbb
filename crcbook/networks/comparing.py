r"""Holding the network that was read against the model itself.

A reader knows what a module computes from its type alone, and Python offers many ways to compute
something else under the same type. So the model is evaluated: on a float64 copy of it, where a
difference of a few roundings counts, and as it is, in its own precision. Two evaluations of one
function in floating point differ by no more than the sum of their rounding errors, which are
bounded here entry by entry; what differs by more is another function.
"""

import copy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from crcbook.networks.network import Network

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


def compare(
    model: nn.Module, network: Network, shape: tuple[int, ...], like: Tensor, at: Tensor | None
) -> None:
    """Check that a model computes what the network read from it does.

    Args:
        model: the model.
        network: what was read, in float64.
        shape: of one input, as the model takes it.
        like: a tensor of the dtype and on the device of the model.
        at: ``(batch, *shape)`` inputs to look at besides random points; None for none.

    Raises:
        ValueError: where the two differ by more than rounding, or the model cannot be evaluated.
    """
    points = _points(network, at).to(like.dtype).reshape(-1, *shape)
    _compare(_evaluated(model, points.to(like.device)), network, points, like)
    if like.dtype == torch.float64:
        return
    like = like.new_empty(0, dtype=torch.float64, device=network.device)
    try:
        logits = _evaluated(copy.deepcopy(model).to(like), points.to(like))
    except Exception:  # whatever parts of a module that someone wrote for another dtype raise
        return
    _compare(logits, network, points, like)


def _points(network: Network, at: Tensor | None) -> Tensor:
    """``(points, n)`` random points and some of the inputs."""
    generator = torch.Generator().manual_seed(0)
    drawn = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    parts = [scale * torch.randn(_EACH, network.inputs, **drawn) for scale in _SCALES]
    if at is not None and len(at):
        step = -(-len(at) // _MOST_INPUTS)
        parts.append(at.detach()[::step].flatten(1).to("cpu", torch.float64))
    return torch.cat(parts).to(network.device)


def _compare(logits: Tensor, network: Network, points: Tensor, like: Tensor) -> None:
    expected, allowed = _expected(network, points.flatten(1).double(), like)
    if logits.shape != expected.shape:
        raise ValueError(
            f"the model gives {tuple(logits.shape)} for {len(points)} inputs, and the network read "
            f"from it {tuple(expected.shape)}: it cannot be certified"
        )
    gap = (logits.to(expected) - expected).abs()
    wrong = ~(gap <= allowed) & allowed.isfinite()
    if wrong.any():
        found, explained = float(gap[wrong].max()), float(allowed[wrong].max())
        raise ValueError(
            "the model computes something else than what was read from it: logits differ by "
            f"{found:.3g}, where rounding explains {explained:.3g}. Something changes its "
            "forward pass (a patched method, a tensor or a module with operations of its own)"
        )


def _evaluated(model: nn.Module, points: Tensor) -> Tensor:
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
    return logits.flatten(1)


def _expected(network: Network, x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    r"""The network's logits, and how far another evaluation of them can be off.

    If :math:`\hat a` is within e of a, entry by entry, the computed :math:`W\hat a + b` is within
    :math:`|W|e + \rho(|W|(|a| + e) + |b|)`, with :math:`\rho` the relative error of an inner
    product, and an activation of slope at most g is within g times that and a few roundings.

    Args:
        network: the network.
        x: ``(points, n)`` float64.
        like: a tensor of the dtype and on the device of the other evaluation.

    Returns:
        ``(points, classes)`` float64 logits and allowed differences; infinite where the other
        dtype may overflow.
    """
    error, largest, info = torch.zeros_like(x), torch.zeros_like(x[:, 0]), torch.finfo(like.dtype)
    for layer in network.layers:
        row, size = layer.activation, layer.weight.abs().T
        terms = (x.abs() + 2 * error) @ size + layer.bias.abs()
        x = torch.addmm(layer.bias, x, layer.weight.T)
        error = error @ size + 2 * _relative(layer.weight.shape[1], like) * terms
        error = error + layer.weight.shape[1] * info.tiny
        largest = largest.maximum(terms.amax(1))
        at_zero = row.value(x.new_zeros(())).abs()
        scale = row.max_slope * (x.abs() + 2 * error) + at_zero
        # A straight line in place of the curve, from where one evaluation may take it.
        jump = x + 2 * error + _ROUNDINGS * info.eps * x.abs() >= row.deviates_from
        error = row.max_slope * error + _ROUNDINGS * info.eps * scale + row.deviation * jump
        x = row.value(x)
    fits = largest < info.max / 4
    return x, torch.where(fits[:, None], 4 * error, torch.inf)


def _relative(terms: int, like: Tensor) -> float:
    """The relative error of an inner product, to first order."""
    if like.dtype == torch.float64:
        return (terms + 2) * _DOUBLE
    if like.dtype != torch.float32:
        return (terms + 4) * torch.finfo(like.dtype).eps
    exact = like.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return (terms + 2) * _SINGLE + (0 if exact else 4 * _TENSOR_CORES)
