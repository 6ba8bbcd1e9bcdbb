r"""Estimates of eigenvalues: by power iteration, for training, and others, for guesses.

None of them is a bound; :mod:`crcbook.proof.eigenvalues` has those.
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


def eigenpairs_estimate(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """About the eigenvalues and eigenvectors of symmetric matrices, in float32, for guesses.

    LAPACK does not always converge, in float32 less often than in float64. Where neither does, the
    diagonal is taken for the eigenvalues.

    Args:
        matrix: ``(..., n, n)`` float64, symmetric.

    Returns:
        ``(..., n)`` ascending values and ``(..., n, n)`` vectors, the columns, float64; not finite
        where a matrix is not.
    """
    size = matrix.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
    scaled = (matrix / size).nan_to_num(0.0, 0.0, 0.0)
    for dtype in (torch.float32, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(scaled.to(dtype))
            break
        except torch.linalg.LinAlgError:
            continue
    else:
        values, order = scaled.diagonal(dim1=-2, dim2=-1).sort()
        vectors = torch.eye(matrix.shape[-1], device=matrix.device)[order].mT
    return values.double() * size[..., 0], vectors.double()


def _image(matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    for matrix in reversed(matrices):
        x = x @ matrix.T
    return x
