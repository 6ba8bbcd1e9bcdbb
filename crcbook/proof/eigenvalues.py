r"""Largest eigenvalues and spectral norms, proved.

A power iteration approaches :math:`\|A\|` from below, so what it returns after any number of steps
is an estimate and no bound. Here an estimate is only a guess, which a Cholesky factorisation then
proves: if :math:`sI - A^TA` has a factorisation, s bounds every eigenvalue of :math:`A^TA`, up to a
rounding that is known (Rump, "Verification of positive definiteness", BIT 2006).
"""

from itertools import pairwise

import torch
from torch import Tensor

from crcbook.proof.arithmetic import OUTWARD, UNIT

# Guesses are raised by these shares of themselves until one is proved.
_SLACKS = (1e-8, 1e-5, 1e-3, 1e-1)
_SLACKS_OF_A_GUESS = (5e-3, 3e-2, 2e-1)
_LANCZOS_STEPS = 40  # usually enough for a guess within 1e-8
_BLOCKS = 4  # of columns of a symmetric product; more spare less than their calls cost
_CHUNK_ELEMENTS = 2**22  # of float64 in one batch of matrices: 32 MB


def spectral_norm_bound(weight: Tensor) -> float:
    r"""A proved upper bound of :math:`\|W\|_2`, usually within 1e-8 of it, relative.

    Args:
        weight: ``(outputs, inputs)`` float64.

    Returns:
        The bound.
    """
    ones = weight.new_ones(1, weight.shape[0])
    return float(top_eigenvalue_bound(weight, ones).sqrt()) * OUTWARD


def top_eigenvalue_bound(weight: Tensor, diagonal: Tensor, guess: Tensor | None = None) -> Tensor:
    r"""Proved upper bounds of :math:`\max(0, \lambda_{\max}(W^T\mathrm{diag}(d)W))`.

    With :math:`T = \sum_j |d_j| \|w_j\|^2`, the computed matrix differs from the true one by at
    most :math:`\gamma_{k+4} T` in norm, and a Cholesky factorisation that runs to completion on a
    matrix B of order n proves :math:`\lambda_{\min}(B) \ge -2\gamma_{n+1}\,\mathrm{tr}\,B`
    (Higham, *Accuracy and Stability of Numerical Algorithms*, theorem 10.3). Both are added to the
    shift that was proved.

    Args:
        weight: ``(outputs, inputs)`` float64.
        diagonal: ``(batch, outputs)`` float64 rows d, of any sign.
        guess: ``(batch,)`` estimates within a hundredth or so, which spare the search for closer
            ones; None for bounds that are usually within 1e-8.

    Returns:
        ``(batch,)`` float64 upper bounds; infinity where an entry is not finite.
    """
    largest = diagonal.abs().amax(1)
    usable = (largest > 0) & largest.isfinite() & weight.isfinite().all()
    unit = diagonal[usable] / largest[usable, None]  # homogeneous in d and W: no overflow
    weight_size = weight.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    scale = largest[usable] * weight_size * weight_size
    guess = torch.full_like(scale, torch.nan) if guess is None else guess[usable] / scale
    chunk = max(1, _CHUNK_ELEMENTS // max(weight.numel(), weight.shape[1] ** 2))
    parts = zip(unit.split(chunk), guess.split(chunk), strict=True) if len(unit) else ()
    found = [_unit_bound(weight / weight_size, *part) for part in parts]
    bound = torch.full_like(largest, torch.inf).masked_fill(largest == 0, 0.0)
    if found:
        bound[usable] = torch.cat(found) * scale * OUTWARD
    return bound


def _unit_bound(weight: Tensor, diagonal: Tensor, guess: Tensor) -> Tensor:
    if (diagonal >= 0).all():
        # Rows without weight take no part, and of the two Gram matrices the smaller one will do.
        rank = int((diagonal > 0).sum(1).amax())
        size, rows = diagonal.topk(rank, dim=1)
        scaled = size.sqrt()[:, :, None] * weight[rows]
        scaled = scaled if rank < weight.shape[1] else scaled.mT
        gram = _symmetric_product(scaled, scaled.mT)
    else:
        gram = _symmetric_product(weight.T[None], diagonal[:, :, None] * weight)
    total = (diagonal.abs() * weight.square().sum(1)).sum(1)
    shift = total.clone()  # bounds the largest eigenvalue, proved or not
    todo = torch.arange(len(gram), device=gram.device)
    slacks = _SLACKS if guess.isnan().any() else _SLACKS_OF_A_GUESS
    if slacks is _SLACKS:
        guess = _largest_eigenvalue_estimate(gram)
    guess = guess.clamp(min=0)
    for slack in slacks:
        candidate = torch.minimum(guess * (1 + slack) + 1e-3 * slack * total, total)[todo]
        proved = _exceeds_eigenvalues(candidate, gram[todo])
        shift[todo[proved]] = candidate[proved]
        todo = todo[~proved]
        if not len(todo):
            break
    order = gram.shape[1]
    gram_error = 2 * (max(weight.shape) + 8) * UNIT * total
    cholesky_error = 4 * (order + 4) * UNIT * (order * shift + total)
    return (shift + gram_error + cholesky_error) * OUTWARD


def _symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """A batch of products that are symmetric: what is below the diagonal blocks is copied."""
    ends = [order * left.shape[1] // _BLOCKS for order in range(_BLOCKS + 1)]
    product = right.new_empty(len(right), left.shape[1], right.shape[2])
    for begin, end in pairwise(ends):
        product[:, begin:end, begin:] = left[:, begin:end] @ right[:, :, begin:]
        product[:, begin:end, :begin] = product[:, :begin, begin:end].mT
    return product


def _exceeds_eigenvalues(shift: Tensor, gram: Tensor) -> Tensor:
    shifted = -gram
    shifted.diagonal(dim1=1, dim2=2).add_(shift[:, None])
    return torch.linalg.cholesky_ex(shifted).info == 0


def _largest_eigenvalue_estimate(gram: Tensor) -> Tensor:
    """Lanczos with full orthogonalisation, batched: close, and from below.

    The vector is found in single precision, which its Rayleigh quotient squares.
    """
    exact, gram = gram, gram.float()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(gram.shape[1], generator=generator, dtype=gram.dtype, device="cpu")
    vector = vector.to(gram)
    basis = (vector / vector.norm()).expand(len(gram), 1, -1)
    for _ in range(min(_LANCZOS_STEPS, gram.shape[1]) - 1):
        vector = basis[:, -1:] @ gram  # a row: products with one column are slow
        size = vector.norm(dim=2, keepdim=True)
        for _ in range(2):
            vector = vector - vector @ basis.mT @ basis
        rest = vector.norm(dim=2, keepdim=True)
        # What rounding leaves of a vector inside the span is noise: the search has ended there.
        vector = torch.where(rest > 1e-5 * size, vector / rest, 0.0)
        basis = torch.cat([basis, vector], dim=1)
    ritz = torch.linalg.eigh(basis @ gram @ basis.mT).eigenvectors[:, :, -1:]
    vector = (ritz.mT @ basis).to(exact)
    size = vector.square().sum((1, 2)).clamp(min=0.5)  # 1, or 0 where the search had ended
    return ((vector @ exact) * vector).sum((1, 2)) / size
