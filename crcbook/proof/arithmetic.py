r"""Floating-point arithmetic as the proofs see it.

With unit roundoff u, a computed sum or inner product of k rounded terms errs by at most
:math:`\gamma_k = ku/(1-ku)` times the sum of the terms' magnitudes, in any order of summation and
with or without fused operations, plus what underflow takes (Higham, *Accuracy and Stability of
Numerical Algorithms*, section 3.1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, maximum

from crcbook.activations import ROUNDING

UNIT = 2.0**-53

# Bounds are themselves computed in float64, each from a few dozen positive terms and from norms of
# at most 200,000 entries, whose relative error is below 0.8 of this one.
OUTWARD = 1 + 2.0**-36

# Of a ball's radius: points of expansion stay within, so that rounding moves none out of the ball.
INSIDE = 1 - 1e-9

# More than underflow can take in float64: from a sum of products, and from an l2 norm.
TINY = 1e-290
TINY_NORM = 1e-140


def gamma(terms: int, unit: float = UNIT) -> float:
    r""":math:`\gamma_k = ku/(1-ku)`.

    Args:
        terms: the number of roundings k.
        unit: the unit roundoff u; that of float64 where none is given.

    Returns:
        The relative error of a sum of that many rounded terms.
    """
    return terms * unit / (1 - terms * unit)


@dataclass(frozen=True)
class Arithmetic:
    """A floating-point format, with what its operations can lose.

    Attributes:
        dtype: the format.
        unit: its unit roundoff u.
        tiny: more than underflow, gradual or not, can take from a vector of sums of products, in
            the l2 norm.
        tiny_norm: more than underflow can take from an l2 norm.
        activation: the relative error of a row of the table of activations.
        largest: where every product of sizes stays below, nothing overflows.
    """

    dtype: torch.dtype
    unit: float
    tiny: float
    tiny_norm: float
    activation: float
    largest: float

    def gamma(self, terms: int) -> float:
        r""":math:`\gamma_k` of this format.

        Args:
            terms: the number of roundings k.

        Returns:
            The relative error of a sum of that many rounded terms.
        """
        return gamma(terms, self.unit)

    def norm(self, rows: Tensor) -> Tensor:
        """The l2 norms of computed vectors, rounded upward.

        Args:
            rows: ``(..., n)`` in this format.

        Returns:
            ``(...)`` float64.
        """
        return rows.norm(dim=-1).double() * (1 + self.gamma(rows.shape[-1] + 8)) + self.tiny_norm


DOUBLE = Arithmetic(torch.float64, UNIT, TINY, TINY_NORM, ROUNDING, 1e280)
SINGLE = Arithmetic(torch.float32, 2.0**-24, 1e-28, 1e-16, ROUNDING * 2.0**29, 1e30)


def matrix_interval(low: Tensor, high: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The range of ``v @ weight`` for v in [low, high], rounded outward.

    Args:
        low: ``(batch, outputs)`` float64 lower ends.
        high: ``(batch, outputs)`` float64 upper ends.
        weight: ``(outputs, inputs)`` float64.

    Returns:
        ``(batch, inputs)`` lower and upper ends.
    """
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    size = maximum(low.abs(), high.abs()).detach() @ weight.detach().abs()
    error = 2 * gamma(2 * weight.shape[0] + 4) * size
    return (
        low @ positive + high @ negative - error,
        high @ positive + low @ negative + error,
    )


def single_sums_hold(device: torch.device) -> bool:
    """Whether float32 products of matrices are what they say: asked of the device itself.

    Settings, and variables of the environment, can let them round to TF32 or bfloat16 first, or to
    two bfloat16 numbers, which these products show.

    Args:
        device: where the products are computed.

    Returns:
        Whether the largest errors are below those of float32 sums.
    """
    # Just below the middle between 1 and the next TF32 number, so that both would take it for 1.
    middle, size = 1 + 2.0**-11 - 2.0**-20, 256
    matrix = torch.full((size, size), middle, dtype=torch.float32, device=device)
    sums = (matrix @ matrix).double() / (size * middle * middle) - 1
    # One product an entry: all 24 bits count.
    matrix = torch.eye(size, dtype=torch.float32, device=device) * (4 / 3)
    entry = matrix[0, 0].double()
    products = (matrix @ matrix).double().diagonal() / (entry * entry) - 1
    return bool(
        (sums.abs().max() <= SINGLE.gamma(size + 2)) & (products.abs().max() <= SINGLE.gamma(2))
    )
