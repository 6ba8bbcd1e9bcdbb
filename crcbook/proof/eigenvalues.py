r"""Spectral norms: proved bounds for certificates, estimates for training.

A power iteration approaches :math:`\|A\|` from below, so what it returns after any number of steps
is an estimate and no bound. Here an estimate is only a guess, which a Cholesky factorisation then
proves: if :math:`sI - A^TA` has a factorisation, s bounds every eigenvalue of :math:`A^TA`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crcbook.proof.arithmetic import (
    OUTWARD,
    SINGLE_TINY,
    SINGLE_TINY_NORM,
    SINGLE_UNIT,
    TINY_NORM,
    UNIT,
    gamma,
)

_SLACKS = (1e-8, 1e-5, 1e-3, 1e-1)
_LANCZOS_STEPS = 40
_CHUNK_ELEMENTS = 2**22
_DOUBLE = UNIT, 0.0, TINY_NORM
_SINGLE = SINGLE_UNIT, SINGLE_TINY, SINGLE_TINY_NORM
_SKETCHED = 0.2  # of the largest singular value: what a sketch leaves out is smaller


def spectral_norm_bound(weight: Tensor) -> float:
    r"""A proved upper bound of :math:`\|W\|_2`, usually within 1e-8 of it, relative.

    Args:
        weight: ``(outputs, inputs)`` float64.

    Returns:
        The bound.
    """
    ones = weight.new_ones(1, weight.shape[0])
    return float(top_eigenvalue_bound(weight, ones).sqrt()) * OUTWARD


@dataclass(frozen=True)
class NormSketch:
    r"""A cheap upper bound of :math:`\|vW\|`, for many rows v.

    With P of low rank and :math:`WW^T \preceq PP^T + \tau I`, :math:`\|vW\|^2 \le \|vP\|^2 +
    \tau\|v\|^2`. P holds the largest singular directions; that the rest is at most
    :math:`\tau` is proved like any other eigenvalue.

    Attributes:
        factor: ``(outputs, rank)`` P.
        rest: :math:`\tau`.
        basis: ``(inputs, rank)`` V, the right singular vectors kept, about orthonormal.
        norm: a proved bound of the norm of V.
        image: ``(outputs, rank)`` WV, as computed.
        shrink: ``(rank,)`` how much shorter the columns of P are than those of :math:`WV`.
    """

    factor: Tensor
    rest: float
    basis: Tensor
    norm: float
    image: Tensor
    shrink: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "NormSketch | None":
        """Sketch a matrix.

        Args:
            weight: ``(outputs, inputs)`` float64.

        Returns:
            The sketch; None where a good one has more than half the rank of the matrix.
        """
        size = weight.abs().max()
        if not 1e-100 < size < 1e100:
            return None
        wide = weight.shape[0] < weight.shape[1]
        squares, vectors = torch.linalg.eigh(weight @ weight.T if wide else weight.T @ weight)
        squares = squares.clamp(min=0)
        rank = int((squares > _SKETCHED**2 * squares[-1]).sum())
        if not 0 < rank <= min(weight.shape) // 2:
            return None
        kept, first_left_out = squares[-rank:], squares[-rank - 1]
        vectors = vectors[:, -rank:]
        basis = weight.T @ vectors / kept.sqrt() if wide else vectors
        shrink = (1 - first_left_out / kept).clamp(min=0).sqrt()
        image = weight @ basis
        factor = image * shrink
        rows = torch.cat([weight.T, factor.T])
        signs = torch.ones_like(rows[None, :, 0])
        signs[:, weight.shape[1] :] = -1
        rest = float(top_eigenvalue_bound(rows, signs))
        return cls(factor, rest, basis, spectral_norm_bound(basis), image, shrink)

    def norms(self, v: Tensor, rest: Tensor | float = torch.inf) -> tuple[Tensor, Tensor]:
        r"""Rows times P, and bounds of the norms of the rows times W.

        With :math:`\gamma` for the precision of v, the product errs by at most
        :math:`\gamma \|v\| \|P\|_F`, the rounding of v and P included.

        Args:
            v: ``(..., outputs)``, float64, or float32 whose entries may each be off by a few
                roundings.
            rest: ``(...)`` float64 bounds of :math:`(\|vW\|^2 - \|vP\|^2)^{1/2}`, as from a
                :class:`Remainder`, where they may be below :math:`\sqrt\tau\|v\|`.

        Returns:
            ``(..., rank)`` rows times P in v's precision, and ``(...)`` float64 bounds, infinite
            where v is not finite.
        """
        unit, tiny, tiny_norm = _DOUBLE if v.dtype == torch.float64 else _SINGLE
        terms = gamma(v.shape[-1] + self.factor.shape[1] + 24, unit)
        size, image = float(self.factor.norm()), v @ self.factor.to(v.dtype)
        main, length = (row.norm(dim=-1).double() * (1 + terms) for row in (image, v))
        main = main + (terms * size + tiny) * length
        rest = (self.rest**0.5 * length).fmin(torch.as_tensor(rest).to(length))
        bound = (main.square() + rest.square()).sqrt()
        bound = bound + tiny_norm * (1 + size + self.rest**0.5)
        return image, (bound * OUTWARD).nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass(frozen=True)
class Remainder:
    r"""What a sketch leaves out of :math:`\|(w \odot s)W\|`, for a few rows w and many s.

    Let :math:`-\varepsilon I \preceq M \preceq \tau I` for :math:`M = WW^T - PP^T`. Few s come
    near the bound :math:`\sqrt\tau\|w \odot s\|`. But M is known, and where s is close to a
    combination Uc of a few fixed vectors, the triangle inequality leaves little to that bound:

    .. math:: \sqrt{(w \odot s) M (w \odot s)^T} \le
       \sqrt{c^TKc + \varepsilon\|w \odot Uc\|^2} +
       \sqrt{\tau+\varepsilon}\,\|w \odot (s - Uc)\|, \qquad
       K = U^T\mathrm{diag}(w) M\,\mathrm{diag}(w)U,

    with one small matrix K a row. Any c will do, such as :math:`U^Ts` with its rounding. Rows are
    kept with a largest entry of 1, so that single precision holds their squares.

    Attributes:
        basis: ``(outputs, size)`` U, of numbers that float32 holds.
        forms: ``(size, rows * size)`` the K, one beside the other.
        squares: ``(rows, outputs)`` squares of the entries of w.
        scales: ``(rows,)`` float64, what the rows were divided by.
        sizes: ``(rows,)`` float64, the Frobenius norms of K.
        slack: a bound of the norms of what K errs by, with what :math:`\varepsilon` adds.
        root: :math:`\sqrt{\tau+\varepsilon}`.
    """

    basis: Tensor
    forms: Tensor
    squares: Tensor
    scales: Tensor
    sizes: Tensor
    slack: float
    root: float

    @classmethod
    def of(cls, weight: Tensor, sketch: NormSketch, rows: Tensor, near: Tensor) -> "Remainder":
        r"""Prepare the matrices of some rows.

        With :math:`B = (W, P)`, K errs by at most :math:`\gamma\|B\|_F^2\|U\|_F^2` in norm.

        Args:
            weight: ``(outputs, inputs)`` float64, W.
            sketch: its sketch.
            rows: ``(rows, outputs)`` float64, w.
            near: ``(outputs, size)`` float64, vectors that combine to something like the s.

        Returns:
            The remainder.
        """
        both = torch.cat([weight, sketch.factor], dim=1)
        signs = torch.ones_like(both[:1])
        signs[:, weight.shape[1] :] = -1
        below = float(top_eigenvalue_bound(both.T, -signs))
        basis = torch.linalg.qr(near).Q.float().double()
        scales = rows.abs().amax(1)
        rows = rows / scales.clamp(min=torch.finfo(rows.dtype).tiny)[:, None]
        images = ((row[:, None] * basis).T @ both for row in rows)
        forms = torch.stack([image * signs @ image.T for image in images])
        size, terms = float(basis.square().sum()), gamma(2 * sum(both.shape) + 32)
        slack = (terms * float(both.square().sum()) + below) * size * OUTWARD
        root = (sketch.rest + below) ** 0.5 * OUTWARD
        norms, forms = forms.flatten(1).norm(dim=1), torch.cat(tuple(forms), dim=1)
        return cls(basis, forms, rows.square(), scales, norms, slack, root)

    def to(self, dtype: torch.dtype) -> "Remainder":
        """The same remainder for vectors of another precision.

        Args:
            dtype: float64 or float32.

        Returns:
            The remainder.
        """
        rounded = {name: getattr(self, name).to(dtype) for name in ("basis", "forms", "squares")}
        return replace(self, **rounded)

    def norms(self, s: Tensor) -> Tensor:
        r"""Bounds of :math:`((w \odot s)M(w \odot s)^T)^{1/2}`.

        With :math:`\gamma` for the precision of s, :math:`s - Uc` errs by
        :math:`\gamma(\|s\| + \|U\|_F\|c\|)`, the rounding of s included, the sums of its weighted
        squares by :math:`\gamma` times themselves, and :math:`c^TKc` by
        :math:`\gamma\|K\|_F\|c\|^2`, the rounding of K included.

        Args:
            s: ``(batch, outputs)`` of this remainder's precision, its entries rounded to it.

        Returns:
            ``(batch, rows)`` float64; infinite or NaN where something overflows.
        """
        unit, _, tiny_norm = _DOUBLE if s.dtype == torch.float64 else _SINGLE
        outputs, size = self.basis.shape
        terms, more = gamma(size + 8, unit), 1 + gamma(outputs + 16, unit)
        c = s @ self.basis
        left = s - c @ self.basis.T
        form = ((c @ self.forms).unflatten(1, (-1, size)) * c[:, None]).sum(2).double()
        form = torch.where(form.isfinite(), form.clamp(min=0), torch.inf)
        length, total = (
            row.norm(dim=1, keepdim=True).double() * more + tiny_norm for row in (c, s)
        )
        near = (form + (2 * terms * self.sizes + self.slack) * length.square()).sqrt()
        far = (left.square() @ self.squares.T).double().sqrt() * more
        far = far + terms * (total + float(self.basis.norm()) * length)
        tiny = tiny_norm * (1 + length + self.root)
        return (near + self.root * far + tiny) * self.scales * OUTWARD


def top_eigenvalue_bound(weight: Tensor, diagonal: Tensor) -> Tensor:
    r"""Proved upper bounds of :math:`\max(0, \lambda_{\max}(W^T\mathrm{diag}(d)W))`.

    With :math:`T = \sum_j |d_j| \|w_j\|^2`, the computed matrix differs from the true one by at
    most :math:`\gamma_{k+4} T` in norm, and a Cholesky factorisation that runs to completion on a
    matrix B of order n proves :math:`\lambda_{\min}(B) \ge -2\gamma_{n+1}\,\mathrm{tr}\,B`
    (Higham, *Accuracy and Stability of Numerical Algorithms*, theorem 10.3). Both are added to the
    shift that was proved.

    Args:
        weight: ``(outputs, inputs)`` float64.
        diagonal: ``(batch, outputs)`` float64 rows d, of any sign.

    Returns:
        ``(batch,)`` float64 upper bounds; infinity where an entry is not finite.
    """
    largest = diagonal.abs().amax(1)
    usable = (largest > 0) & largest.isfinite() & weight.isfinite().all()
    unit = diagonal[usable] / largest[usable, None]  # homogeneous in d and W: no overflow
    weight_size = weight.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    chunk = max(1, _CHUNK_ELEMENTS // max(weight.numel(), weight.shape[1] ** 2))
    parts = [_unit_bound(weight / weight_size, part) for part in unit.split(chunk) if len(part)]
    bound = torch.full_like(largest, torch.inf).masked_fill(largest == 0, 0.0)
    if parts:
        bound[usable] = torch.cat(parts) * largest[usable] * weight_size * weight_size * OUTWARD
    return bound


def _unit_bound(weight: Tensor, diagonal: Tensor) -> Tensor:
    if (diagonal >= 0).all():
        # Rows without weight take no part, and of the two Gram matrices the smaller one will do.
        rank = int((diagonal > 0).sum(1).amax())
        size, rows = diagonal.topk(rank, dim=1)
        scaled = size.sqrt()[:, :, None] * weight[rows]
        gram = scaled @ scaled.mT if rank < weight.shape[1] else scaled.mT @ scaled
    else:
        gram = weight.T @ (diagonal[:, :, None] * weight)
    total = (diagonal.abs() * weight.square().sum(1)).sum(1)
    shift = total.clone()  # bounds the largest eigenvalue, proved or not
    todo = torch.arange(len(gram), device=gram.device)
    guess = _largest_eigenvalue_estimate(gram).clamp(min=0)
    for slack in _SLACKS:
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
    drawn = {"generator": generator, "dtype": gram.dtype, "device": "cpu"}
    vector = torch.randn(gram.shape[1], **drawn).to(gram)
    basis = (vector / vector.norm()).expand(len(gram), 1, -1)
    for _ in range(min(_LANCZOS_STEPS, gram.shape[1]) - 1):
        vector = (gram * basis[:, -1, None, :]).sum(2)  # bmm is slow with one column
        size = vector.norm(dim=1, keepdim=True)
        for _ in range(2):
            vector = vector - (basis.mT @ (basis @ vector[:, :, None])).squeeze(2)
        rest = vector.norm(dim=1, keepdim=True)
        # What rounding leaves of a vector inside the span is noise: the search has ended there.
        vector = torch.where(rest > 1e-5 * size, vector / rest, 0.0)
        basis = torch.cat([basis, vector[:, None]], dim=1)
    ritz = torch.linalg.eigh(basis @ gram @ basis.mT).eigenvectors[:, :, -1:]
    vector = (basis.mT @ ritz).to(exact)
    size = vector.square().sum((1, 2)).clamp(min=0.5)  # 1, or 0 where the search had ended
    return ((exact @ vector) * vector).sum((1, 2)) / size


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
