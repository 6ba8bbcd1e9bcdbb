"""Balls of a fixed radius by the rivals' bounds: a question far cheaper than their radii."""

import torch
from torch import Tensor, nn

from crcbook.checks import as_classes, as_inputs, as_radius
from crcbook.networks import read_network
from crcbook.proof.lines import crown_margin
from crcbook.proof.lipschitz import lipschitz_radius
from crcbook.proof.quadratic import Prover

RIVALS = ("crown", "lipschitz")
_ITEMS = 200  # at a time


def rival_robust(model: nn.Sequential, x: Tensor, y: Tensor, radius: float, rival: str) -> Tensor:
    """Whether a bound other than curvature's proves each label in the l2 ball of a given radius.

    Args:
        model: a Sequential that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        radius: the l2 radius of the ball, in the units of the input.
        rival: ``"crown"``, linear relaxations (which prove all that interval bounds do), or
            ``"lipschitz"``, the margin over a global Lipschitz constant.

    Returns:
        ``(batch,)`` bool: proved against all other classes, as :func:`crcbook.verify` does.

    Raises:
        ValueError: for an unknown bound, a wrong shape or range, NaN or infinity.
    """
    if rival not in RIVALS:
        raise ValueError(f"rival must be one of {', '.join(RIVALS)}; got {rival!r}")
    network = read_network(model)
    prover, radius = Prover.of(network), as_radius(radius)
    x = as_inputs(x, network)
    y = as_classes("y", y, network, batch=len(x))
    parts = zip(x.split(_ITEMS), y.split(_ITEMS), strict=True)
    return torch.cat([_robust(prover, *part, radius, rival) for part in parts])


def _robust(prover: Prover, x: Tensor, y: Tensor, radius: float, rival: str) -> Tensor:
    others = prover.network.classes - 1
    target = torch.arange(others, device=x.device).repeat(len(x))
    label = y.repeat_interleave(others)
    pairs = x.repeat_interleave(others, 0), label, target + (target >= label)
    if rival == "crown":
        proved = crown_margin(prover, *pairs, radius) > 0
    else:
        proved = lipschitz_radius(prover, *pairs) >= radius
    return proved.unflatten(0, (-1, others)).all(1)
