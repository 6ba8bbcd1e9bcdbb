r"""Float64 arithmetic as the proofs see it.

With unit roundoff :math:`u = 2^{-53}`, a computed sum or inner product of k rounded terms errs by
at most :math:`\gamma_k = ku/(1-ku)` times the sum of the terms' magnitudes, in any order of
summation, plus what underflow takes (Higham, *Accuracy and Stability of Numerical Algorithms*,
section 3.1).
"""

import torch
from torch import Tensor, maximum

UNIT = 2.0**-53
SINGLE_UNIT = 2.0**-24

# Bounds are themselves computed in float64, each from a few dozen positive terms and from norms of
# at most 200,000 entries, whose relative error is below 0.8 of this one.
OUTWARD = 1 + 2.0**-36

# More than underflow can take from the last sum or product of a bound, and from a norm. What later
# layers would magnify is covered where it arises: no point counts as shorter than TINY_NORM, and
# the rounding of that is more than underflow takes where weights have the sizes that are accepted.
TINY = 1e-290
TINY_NORM = 1e-140

# More than underflow, gradual or not, can take from vectors of float32 sums of products in the l2
# norm, and from a norm computed in float32.
SINGLE_TINY = 1e-28
SINGLE_TINY_NORM = 1e-16


def gamma(terms: int, unit: float = UNIT) -> float:
    r""":math:`\gamma_k = ku/(1-ku)`.

    Args:
        terms: the number of roundings k.
        unit: the unit roundoff u; that of float64 where none is given.

    Returns:
        The relative error of a sum of that many rounded terms.
    """
    return terms * unit / (1 - terms * unit)


def matrix_interval(low: Tensor, high: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The range of ``v @ weight`` for v in [low, high], rounded outward.

    Args:
        low: ``(pairs, outputs)`` lower ends.
        high: ``(pairs, outputs)`` upper ends.
        weight: ``(outputs, inputs)``.

    Returns:
        ``(pairs, inputs)`` lower and upper ends.
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
        (sums.abs().max() <= gamma(size + 2, SINGLE_UNIT))
        & (products.abs().max() <= gamma(2, SINGLE_UNIT))
    )
