"""Two networks compared image by image."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paired:
    """Two answers to each of the same items.

    Attributes:
        both: items with two times yes.
        first: items with a yes from the first alone.
        second: items with a yes from the second alone.
        neither: the other items.
        p_value: how likely a split of ``first`` to ``second`` at least this uneven is, where a coin
            decides each item on which the two differ.
    """

    both: int
    first: int
    second: int
    neither: int
    p_value: float


def paired(first: Tensor, second: Tensor) -> Paired:
    """Compare two columns item by item, by the exact two-sided sign test (McNemar 1947).

    Items on which the two agree say nothing about which is better. If neither is, each of the n
    others falls to either side like a coin. Two networks on one test set differ on far fewer items
    than two test sets would, so this sees differences that intervals around two accuracies hide. It
    compares the two networks, not the two recipes: those need several seeds.

    Args:
        first: ``(items,)`` bool.
        second: ``(items,)`` bool, of the same items.

    Returns:
        The counts and the p-value.

    Raises:
        ValueError: where the two are not bool columns of one length.
    """
    if first.dtype != torch.bool or second.dtype != torch.bool or first.shape != second.shape:
        raise ValueError(
            "two bool columns of one length are compared; got "
            f"{first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}"
        )
    alone, other = int((first & ~second).sum()), int((second & ~first).sum())
    differing = alone + other
    # Whole numbers: no rounding until the end.
    tail = sum(math.comb(differing, count) for count in range(min(alone, other) + 1))
    p_value = min(1.0, float(Fraction(2 * tail, 2**differing)))
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    return Paired(both, alone, other, neither, p_value)
