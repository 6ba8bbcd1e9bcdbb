r"""Certified radii from a Lipschitz constant: the first-order bound the book compares with.

If a margin's gradient is nowhere longer than L, then :math:`f(x+\delta) \ge f(x) - L\|\delta\|`,
and no point closer than f(x)/L is on the other side. The gradient of :math:`z_y - z_t` is
:math:`(e_y - e_t)^T B_L` with the Jacobian :math:`B_L` of the logits. The usual bound is the
product of norms (Tsuzuku, Sato & Sugiyama 2018, "Lipschitz-Margin Training")

.. math:: L \le \|w\| \prod_{I=1}^{L-1} g \|W_I\|, \qquad w = W_L^T (e_y - e_t).

The slopes between the layers vary, :math:`\sigma' = c + r \odot e` with :math:`|e| \le 1`, and with
the links (matrices M with factors :math:`\kappa`) of :mod:`crcbook.proof.curvature` for the
Jacobian of the last hidden layer,

.. math:: L \le \sum \kappa \|w\,\mathrm{diag}(c)\,M\| + \|w\,\mathrm{diag}(\sqrt r)\| \sup_x
   \|\mathrm{diag}(\sqrt r) B_{L-1}(x)\|.

A row's norm needs no eigenvalue problem; only the reaches :math:`\sup\|\mathrm{diag}(\sqrt r)
B_I\|` do, once a network. The smaller of the two bounds is taken.
"""

import torch
from torch import Tensor

from crcbook.networks import Network, remembered
from crcbook.proof.arithmetic import OUTWARD, TINY_NORM, UNIT, gamma
from crcbook.proof.curvature import Link, jacobian_chains, proved
from crcbook.proof.prover import Prover


def lipschitz_bound(prover: Prover, label: Tensor, target: Tensor) -> Tensor:
    r"""Proved Lipschitz constants of margins over all of R^n, in the l2 norm.

    Args:
        prover: the float64 network with its error bounds.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.

    Returns:
        ``(pairs,)`` float64 upper bounds of :math:`\sup\|\nabla f\|`, never above the product of
        norms; 0 where the two classes share their last weights.
    """
    weights = prover.network.margin_weights(label, target)
    links = _logit_links(prover.network)
    terms = 1 + gamma(prover.network.inputs + prover.network.layers[-1].weight.shape[1] + 8)
    total = torch.zeros_like(weights[:, 0])
    for link in links:
        # Each of the two rows carries the link's error and the rounding of its own entries.
        rows = link.matrix[label], link.matrix[target]
        error = 2 * link.error + 4 * UNIT * sum(row.norm(dim=1) for row in rows)
        row = (rows[0] - rows[1]).norm(dim=1) * terms
        total = total + link.factor * (row + error)
    bound = torch.fmin(total * OUTWARD, _product_bound(prover, weights)) + TINY_NORM
    return bound.masked_fill((weights == 0).all(1), 0.0)


def _product_bound(prover: Prover, weights: Tensor) -> Tensor:
    product = weights.norm(dim=1) * (1 + gamma(weights.shape[1] + 4))
    for layer, norm in zip(prover.network.layers[:-1], prover.rounding.norms, strict=True):
        product = product * layer.activation.max_slope * norm
    return product * OUTWARD


@remembered
def _logit_links(network: Network) -> list[Link]:
    """The terms of the logits' Jacobian, one row a class."""
    chains, _ = jacobian_chains(network.layers, proved)
    return chains[-1]
