r"""Taylor's theorem with a curvature that grows outward."""

import torch
from torch import Tensor

from crcbook.proof.arithmetic import OUTWARD

SHELLS = 16  # each costs intervals of its own; more of them lose less


def shells(like: Tensor) -> tuple[Tensor, Tensor]:
    r"""Where nested shells of equal thickness end, and what their curvatures weigh.

    The remainder of Taylor's theorem over a way of length 1 gives the part of it from
    :math:`t_{i-1}` to :math:`t_i` the weight :math:`(1-t_{i-1})^2 - (1-t_i)^2`.

    Args:
        like: a float64 tensor, for its device.

    Returns:
        ``(SHELLS,)`` ends, the last of them 1, and ``(SHELLS,)`` weights, rounded upward.
    """
    ends = torch.linspace(0, 1, SHELLS + 1, dtype=like.dtype, device=like.device)
    ahead = (1 - ends).square()
    return ends[1:], (ahead[:-1] - ahead[1:]) * OUTWARD
