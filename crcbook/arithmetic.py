r"""Float64 arithmetic as the proofs see it.

With unit roundoff :math:`u = 2^{-53}`, a computed sum or inner product of k rounded terms errs by
at most :math:`\gamma_k = ku/(1-ku)` times the sum of the terms' magnitudes, in any order of
summation, plus what underflow takes (Higham, *Accuracy and Stability of Numerical Algorithms*,
section 3.1).
"""

from torch import Tensor, maximum

UNIT = 2.0**-53

# Bounds are themselves computed in float64, each from a few dozen positive terms and from norms of
# at most 200,000 entries, whose relative error is below 0.8 of this one.
OUTWARD = 1 + 2.0**-36

# More than underflow can take from any sum or product here, and from the square of a norm, of
# networks whose weights have sizes that are accepted.
TINY = 1e-290
TINY_NORM = 1e-140


def gamma(terms: int) -> float:
    r""":math:`\gamma_k = ku/(1-ku)`.

    Args:
        terms: the number of roundings k.

    Returns:
        The relative error of a sum of that many rounded terms.
    """
    return terms * UNIT / (1 - terms * UNIT)


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
