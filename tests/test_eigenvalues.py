"""Proved norms are never too small, and hardly ever too large."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crcbook.power_iteration import eigenpairs_estimate, top_eigenvalue_estimate
from crcbook.proof.eigenvalues import spectral_norm_bound, top_eigenvalue_bound


def svd_norm(matrix):
    return float(torch.linalg.svdvals(matrix)[0])


@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    scale=st.sampled_from([1e-150, 1e-3, 1.0, 1e3, 1e150]),
    seed=st.integers(0, 10**6),
)
def test_bound_is_above_and_close_to_the_norm(rows, columns, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    norm = svd_norm(matrix)
    bound = spectral_norm_bound(matrix * scale) / scale
    assert norm * (1 - 1e-14) <= bound <= norm * (1 + 1e-4)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.eye(20).double(),
        torch.ones(7, 30).double(),
        torch.diag(torch.tensor([1.0, 1 - 1e-9, 0.5])).double(),
        torch.ones(1, 1).double(),
    ],
)
def test_bound_is_tight_at_known_norms(matrix):
    assert spectral_norm_bound(matrix) == pytest.approx(svd_norm(matrix), rel=1e-7)


def test_zero_matrices_and_zero_scales_have_norm_zero():
    assert spectral_norm_bound(torch.zeros(4, 5).double()) == 0
    bounds = top_eigenvalue_bound(
        torch.eye(3).double(), torch.tensor([[0.0, 0, 0], [0, 2, 1]]).double()
    )
    assert bounds[0] == 0 and bounds[1] == pytest.approx(2, rel=1e-7)


def test_scales_that_are_not_finite_bound_nothing():
    scales = torch.tensor([[torch.inf, 1], [torch.nan, 1]]).double()
    assert not (top_eigenvalue_bound(torch.eye(2).double(), scales) < torch.inf).any()


def test_many_scales_equal_each_alone():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 25, generator=generator, dtype=torch.float64)
    scales = torch.rand(15, 40, generator=generator, dtype=torch.float64)
    together = top_eigenvalue_bound(weight, scales)
    for bound, row in zip(together, scales, strict=True):
        top = torch.linalg.eigvalsh(weight.T @ (row[:, None] * weight))[-1].item()
        assert top * (1 - 1e-12) <= bound.item() <= top * (1 + 1e-4)


@given(
    rows=st.integers(1, 25), columns=st.integers(1, 25), seed=st.integers(0, 10**6),
    shift=st.sampled_from([-2.0, 0.0, 2.0]),
)  # fmt: skip
def test_bound_holds_and_is_tight_for_diagonals_of_any_sign(rows, columns, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    diagonal = shift + torch.randn(3, rows, generator=generator, dtype=torch.float64)
    for bound, row in zip(top_eigenvalue_bound(weight, diagonal), diagonal, strict=True):
        matrix = weight.T @ (row[:, None] * weight)
        top = torch.linalg.eigvalsh(matrix)[-1].clamp(min=0).item()
        size = (row.abs() @ weight.square()).sum().item()
        assert top - 1e-13 * size <= bound.item() <= top * (1 + 1e-4) + 1e-6 * size


def test_bound_holds_where_ten_power_steps_fall_five_percent_short():
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(300, 300, generator=generator).double())[0]
    singular = torch.cat([torch.tensor([1.0]), torch.linspace(0.94, 0.9, 299)]).double()
    matrix = left * singular
    start = torch.randn(1, 300, generator=generator, dtype=torch.float64)
    ones = torch.ones(1, 300, dtype=torch.float64)
    estimate, _ = top_eigenvalue_estimate([matrix], ones, start / start.norm(), steps=10)
    assert float(estimate.sqrt()) < 0.95
    assert 1 <= spectral_norm_bound(matrix) < 1 + 1e-4


def test_estimate_converges_from_below_and_is_differentiable():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    diagonal = torch.rand(2, 12, generator=generator, dtype=torch.float64)
    start = torch.nn.functional.normalize(torch.ones(2, 6).double(), dim=1)
    fixed = weight.detach()
    truth = [torch.linalg.eigvalsh(fixed.T @ (d[:, None] * fixed))[-1].item() for d in diagonal]
    estimate, _ = top_eigenvalue_estimate([weight], diagonal, start, steps=500)
    assert estimate.tolist() == pytest.approx(truth, rel=1e-9)
    early, _ = top_eigenvalue_estimate([weight], diagonal, start, steps=2)
    assert (early <= estimate * (1 + 1e-12)).all()
    (gradient,) = torch.autograd.grad(estimate.sum(), weight)
    assert gradient.abs().sum() > 0


def test_an_estimate_of_zero_is_not_the_last_word():
    weight, ones = torch.diag(torch.tensor([3.0, 1.0])), torch.ones(1, 2)
    start = torch.nn.functional.normalize(ones, dim=1)
    estimate, vector = top_eigenvalue_estimate([weight], 0 * ones, start)
    assert estimate == 0
    estimate, _ = top_eigenvalue_estimate([weight], ones, vector, steps=20)
    assert estimate.item() == pytest.approx(9.0, rel=1e-5)
    small, _ = top_eigenvalue_estimate([1e-8 * weight], ones, vector, steps=20)
    assert small.item() == pytest.approx(9e-16, rel=1e-5)


def test_bound_stays_tight_where_scales_switch_units_off():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 15, generator=generator, dtype=torch.float64)
    scales = torch.randn(40, 12, generator=generator, dtype=torch.float64).clamp(min=0)
    for bound, scale in zip(top_eigenvalue_bound(weight, scales), scales, strict=True):
        norm = svd_norm(scale.sqrt()[:, None] * weight)
        assert bound.item() == pytest.approx(norm**2, rel=1e-7)


@pytest.mark.parametrize("fails", [(), (torch.float32,), (torch.float32, torch.float64)])
def test_guessed_eigenpairs_need_no_convergence(fails, monkeypatch):
    eigh = torch.linalg.eigh

    def stubborn(matrix):
        if matrix.dtype in fails:
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1e-40, 1.0, 1e40], dtype=torch.float64)[:, None, None]
    matrix = (matrix + matrix.mT) * scales
    if len(fails) == 2:
        matrix = torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))
    values, vectors = eigenpairs_estimate(matrix)
    assert (values.diff() >= 0).all()
    again = (vectors * values[:, None]) @ vectors.mT
    size = matrix.abs().amax((1, 2), keepdim=True)
    torch.testing.assert_close(again / size, matrix / size, rtol=0, atol=1e-5)
    broken = matrix.index_fill(0, torch.tensor([1]), torch.nan)
    assert eigenpairs_estimate(broken)[0].isnan().all(1).tolist() == [False, True, False]
