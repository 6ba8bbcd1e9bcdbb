"""The exact Hessian, held against automatic differentiation."""

import pytest
import torch
from conftest import margin_hessian as by_autograd

import crcbook as crc
from crcbook.hessian import hessian_terms, margin_hessian


@pytest.mark.parametrize("sizes", [[3, 5, 4], [3, 6, 5, 4], [2, 7, 3, 5, 3]], ids=str)
@pytest.mark.parametrize("activation", crc.ACTIVATIONS)
def test_it_is_what_automatic_differentiation_says(sizes, activation):
    model = crc.mlp(sizes, activation=activation, seed=1).double()
    points = torch.randn(4, sizes[0], generator=torch.Generator().manual_seed(0)).double()
    hessian = margin_hessian(model, points, 2, 0)
    for point, found in zip(points, hessian, strict=True):
        torch.testing.assert_close(found, by_autograd(model, point, 2, 0))


def test_it_has_a_term_a_hidden_layer():
    model = crc.mlp([3, 6, 5, 4]).double()
    points = torch.ones(2, 3).double()
    terms = hessian_terms(model, points, 1, 0)
    assert [tuple(term.shape) for term in terms] == [(2, 3, 3)] * 2
    torch.testing.assert_close(sum(terms), margin_hessian(model, points, 1, 0))


def test_a_linear_network_has_none():
    assert not margin_hessian(crc.mlp([3, 2]), torch.ones(2, 3), 0, 1).any()


def test_classes_that_the_network_lacks_are_refused():
    for pair in ((2, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"must be in 0\.\.1"):
            margin_hessian(crc.mlp([3, 4, 2]), torch.ones(2, 3), *pair)


def test_it_is_differentiable_in_the_points():
    model = crc.mlp([2, 4, 3, 2], activation="tanh").double()
    point = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).double()
    assert torch.autograd.gradcheck(
        lambda x: margin_hessian(model, x, 0, 1), point.requires_grad_()
    )
