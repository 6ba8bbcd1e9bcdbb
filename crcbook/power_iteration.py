r"""Estimates of largest eigenvalues, by power iteration: for training and for guesses.

They approach an eigenvalue from below, so none of them is a bound;
:mod:`crcbook.proof.eigenvalues` has those.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def top_eigenvalue_estimate(
    matrices: Sequence[Tensor], diagonal: Tensor, start: Tensor, steps: int = 1
) -> tuple[Tensor, Tensor]:
    r"""Estimates of the largest eigenvalue of :math:`W^T\mathrm{diag}(d)W`, by power iteration.

    They approach it from below and are differentiable in W and d: for training, never for a
    certificate. W may be a product, which is never formed.

    Args:
        matrices: the factors of W, in their order: ``(outputs, ...)`` to ``(..., inputs)``.
        diagonal: ``(batch, outputs)`` rows d, nonnegative.
        start: ``(batch, inputs)`` unit vectors, the last call's second result or random.
        steps: the number of power iterations.

    Returns:
        ``(batch,)`` estimates and the ``(batch, inputs)`` vectors to continue from.
    """
    with torch.no_grad():
        for _ in range(steps):
            image = _image(matrices, start) * diagonal
            for matrix in matrices:
                image = image @ matrix
            # A matrix of zeros leaves no direction; the next one may not be of zeros.
            length = image.norm(dim=1, keepdim=True)
            start = torch.where(length > 0, image / length, start)
    return (diagonal * _image(matrices, start) ** 2).sum(1), start


def _image(matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    for matrix in reversed(matrices):
        x = x @ matrix.T
    return x
