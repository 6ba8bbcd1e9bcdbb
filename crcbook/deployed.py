r"""How far a float32 evaluation of a network can be from its margins in real arithmetic.

A certificate speaks of real arithmetic; the program that runs computes in float32, in an order of
summation that nobody promises. This module bounds what that can change, over a whole ball at once:

.. math:: |(\hat z_y - \hat z_t)(x) - f(x)| \le \alpha \|x - c\| + \beta

for every float32 input x up to a distance of 1e6, where the hats are what float32 computes. A bound
:math:`f(x_0+\delta) \ge q - s\cdot\delta - \frac k2\|\delta\|^2` then stays one for the computed
margin at distance :math:`\|\delta\|` with :math:`q - \beta` in the place of q and
:math:`\|s\| + \alpha` in that of :math:`\|s\|`, where :math:`c = x_0`.

**Derivation.** Let u be :math:`2^{-24}` and :math:`\gamma_k = ku/(1-ku)`. Whatever the order, and
with fused operations or without, an inner product of n terms and the addition of a bias commit at
most n + 1 roundings a term, so that the computed preactivation of a layer with input
:math:`\hat a` is off by at most :math:`\gamma_{n+2}(|W||\hat a| + |b|)` in each entry. With
:math:`\|\hat a - a\| \le e`, and :math:`\|a - a_c\| \le D` for the activations :math:`a_c` at c,
in the l2 norm

.. math:: e_z = \|W\|e + \gamma_{n+2}\bigl(\||W||a_c| + |b|\| + \||W|\|(D+e)\bigr) + \epsilon,

where :math:`\epsilon` exceeds all underflow, gradual or not. A float32 activation errs by at most
:math:`\tau` times its natural scale (``SINGLE_ROUNDING``), so with g the largest slope and N the
width

.. math:: e' = g e_z + \tau\bigl(g(Z + e_z) + \sqrt N|\sigma(0)|\bigr) + \epsilon.

Here Z bounds the norm of z. D and Z grow by Lipschitz constants from c; hence all bounds are affine
in :math:`\|x-c\|`, with coefficients that are carried through the layers. The logits of two classes
are two inner products with the same :math:`\hat a`:

.. math:: \|w_y-w_t\|\,e + \gamma_{n+2}\bigl((|w_y|+|w_t|) \cdot |a_c| + (\|w_y\|+\|w_t\|)(D+e) +
   |b_y|+|b_t|\bigr) + \epsilon.

Softplus jumps to the identity above 20 in torch; that is far below :math:`\tau` times 20.
Reduced precision inside products (TF32, bfloat16) and fast products of matrices (Strassen) are
excluded: no such program is covered.

For a certificate (:class:`DeployedRounding`) c is the input and the pair is the worst one: that is
subtracted wherever the rounding of a model's reading would be, so that every bound is one of what
the program computes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from crcbook.activations import ROUNDING
from crcbook.networks import Network, remembered
from crcbook.networks.mixed import Mixed
from crcbook.networks.reading import beside_products
from crcbook.proof.arithmetic import OUTWARD, SINGLE, single_sums_hold
from crcbook.proof.eigenvalues import spectral_norm_bound
from crcbook.proof.prover import Prover
from crcbook.proof.rounding import RoundingModel

# Float32 activations of torch are within it of the truth, relative to the larger of their natural
# scales g|z| and |sigma(0)|: 16 units in the last place, as for float64; the tests compare.
SINGLE_ROUNDING = 2.0**-20
FARTHEST = 1e6  # the distance up to which the bounds hold
_LARGEST = 1e30  # the size below which no sum overflows


@dataclass(frozen=True)
class Affine:
    """A bound that grows with the distance from a centre: ``rate * distance + start``.

    Attributes:
        rate: the growth a unit of l2 distance, a number or a tensor.
        start: ``(pairs,)`` the bound at the centre.
    """

    rate: Tensor | float
    start: Tensor

    def __add__(self, other: "Affine | Tensor | float") -> "Affine":
        """The sum of two bounds, or of a bound and a constant."""
        if isinstance(other, Affine):
            return Affine(self.rate + other.rate, self.start + other.start)
        return Affine(self.rate, self.start + other)

    def at(self, distance: float) -> Tensor:
        """The bound at a distance."""
        return self.rate * distance + self.start

    def __mul__(self, factor: Tensor | float) -> "Affine":
        """The bound times a nonnegative factor."""
        return Affine(self.rate * factor, self.start * factor)


def float32_error(
    network: Network, label: Tensor, target: Tensor, centre: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Bounds of what float32 can change of margins: :math:`\alpha\|x - c\| + \beta`.

    Args:
        network: the float64 network, with weights that float32 holds.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
        centre: ``(pairs, n)`` points c, such as the inputs; the origin where None.

    Returns:
        ``(pairs,)`` :math:`\alpha` and :math:`\beta`, rounded upward; the second infinite where
        float32 could overflow.

    Raises:
        ValueError: where float32 does not hold the weights: what runs is then another network.
    """
    _check_weights(network)
    if centre is None:
        centre = network.layers[0].weight.new_zeros(len(label), network.inputs)
    last = network.layers[-1]
    own, other = last.weight[label], last.weight[target]
    lengths = (own.norm(dim=1) + other.norm(dim=1)) * OUTWARD
    offsets = last.bias[label].abs() + last.bias[target].abs()
    hidden = _hidden_error(network, centre)
    near = (own.abs() + other.abs()) * hidden[0]
    apart = (own - other).norm(dim=1) * OUTWARD
    return _margin_error(network, hidden, apart, lengths, near.sum(1) * OUTWARD + offsets)


def _worst_error(network: Network, centre: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of :func:`float32_error` for the worst two classes at each centre."""
    last, hidden = network.layers[-1], _hidden_error(network, centre)
    longest = 2 * float(last.weight.norm(dim=1).max()) * OUTWARD
    sums = 2 * (hidden[0] @ last.weight.abs().T + last.bias.abs()).amax(1) * OUTWARD
    apart = min(longest, _widest(last.weight))
    return _margin_error(network, hidden, apart, longest, sums)


def _widest(rows: Tensor) -> float:
    """The largest distance between two rows, rounded upward."""
    # Not by products, which cancel.
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return float(apart.max()) * (1 + 1e-6)


def _margin_error(
    network: Network,
    hidden: "tuple[Tensor, Affine, Affine, Tensor]",
    apart: Tensor | float,
    lengths: Tensor | float,
    near: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the last layer adds, by the norms of its rows' differences and of both, and by sums."""
    _, away, error, most = hidden
    sums = (away + error) * lengths + near
    terms = SINGLE.gamma(network.layers[-1].weight.shape[1] + 2)
    total = error * apart + sums * terms + SINGLE.tiny * (1 + lengths)
    most = torch.maximum(most, sums.at(FARTHEST))
    rate = torch.as_tensor(total.rate, dtype=near.dtype, device=near.device).expand_as(near)
    start = torch.where(most < _LARGEST, total.start * OUTWARD, torch.inf)
    return rate * OUTWARD, start


def _hidden_error(network: Network, centre: Tensor) -> tuple[Tensor, Affine, Affine, Tensor]:
    """What is known of the last hidden activations.

    Args:
        network: the float64 network.
        centre: ``(pairs, n)``.

    Returns:
        ``(pairs, width)`` their magnitudes at the centre, as computed; bounds of how far the true
        ones are from these, and of the error of what float32 computes; and ``(pairs,)`` bounds of
        all sums on the way.
    """
    rounding, at_centre = RoundingModel.of(network), network.preactivations(centre)
    slacks = rounding.preactivation_errors(centre.norm(dim=1))
    nothing = torch.zeros_like(centre[:, 0])
    near, away, error = centre.abs(), Affine(1.0, nothing), Affine(0.0, nothing)
    most = near.norm(dim=1) + FARTHEST
    rows = zip(rounding.hidden(), _magnitudes(network), at_centre, slacks, strict=True)
    for (layer, norm, _, _), magnitude, z, slack in rows:
        row, terms = layer.activation, SINGLE.gamma(layer.weight.shape[1] + 2)
        at_zero = layer.at_zero
        sums = (near @ layer.weight.abs().T + layer.bias.abs()).norm(dim=1) * OUTWARD
        sums = (away + error) * magnitude + sums
        most = torch.maximum(most, sums.at(FARTHEST))
        step = error * norm + sums * terms + SINGLE.tiny * (1 + magnitude)
        size = Affine(away.rate * norm, z.norm(dim=1) * OUTWARD + slack)
        error = (step + (size + step) * SINGLE_ROUNDING) * row.max_slope
        error = error + (SINGLE_ROUNDING * at_zero + SINGLE.tiny)
        slack = row.max_slope * slack + ROUNDING * (row.max_slope * size.start + at_zero)
        near, away = row.value(z).abs(), Affine(size.rate * row.max_slope, slack * OUTWARD)
    return near, away, error, most


@remembered
def _magnitudes(network: Network) -> tuple[float, ...]:
    """Bounds of the spectral norms of the hidden weights' absolute values."""
    return tuple(spectral_norm_bound(layer.weight.abs()) for layer in network.layers[:-1])


def float32_holds(values: Tensor) -> bool:
    """Whether float64 numbers are float32 numbers.

    Args:
        values: finite ones, of any shape.

    Returns:
        Whether all of them are.
    """
    return bool((values == values.float().double()).all())


def _check_weights(network: Network) -> None:
    for place, layer in enumerate(network.layers):
        if not (float32_holds(layer.weight) and float32_holds(layer.bias)):
            raise ValueError(
                f"a float32 program needs weights that float32 holds; it would round those of "
                f"Linear layer {place}: convert the model with model.float() first"
            )


@dataclass(frozen=True)
class DeployedRounding(RoundingModel):
    """Error bounds of evaluations for claims about what the network's float32 program computes."""

    @classmethod
    def of(cls, network: Network) -> "DeployedRounding":
        """Prepare the bounds of a network whose weights float32 holds.

        Args:
            network: the float64 network, read from a model of the same layers.

        Returns:
            The model; its ``gap`` is that around the origin.

        Raises:
            ValueError: where float32 does not hold the weights.
        """
        _check_weights(network)
        rate, start = _worst_error(network, network.layers[0].weight.new_zeros(1, network.inputs))
        found = super().of(network)
        return cls(network, found.norms, found.frobenius, found.biases, (float(rate), float(start)))

    def gap_at(self, x: Tensor) -> Tensor:
        """How far margins of the network can be from those that the program computes.

        Args:
            x: ``(batch, n)`` points.

        Returns:
            ``(batch,)``; it grows by ``gap[0]`` a unit of distance, up to ``FARTHEST``.
        """
        return _worst_error(self.network, x)[1] * OUTWARD


def deployed_prover(model: nn.Module, network: Network) -> Prover:
    """A network prepared for proofs about the float32 program that a model is.

    Args:
        model: one that applies Linear layers and activations in turn, the last one Linear.
        network: what was read from it.

    Returns:
        The prover.

    Raises:
        ValueError: for a model of another kind, for weights that float32 does not hold, and where
            this device rounds float32 products to fewer digits.
    """
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("deployed='float32' needs float32 weights: the program is a float32 one")
    if any(isinstance(layer.activation, Mixed) for layer in network.layers):
        raise ValueError(
            "deployed='float32' does not cover branches, such as residual blocks: leave it away, "
            "and the network is certified in exact arithmetic"
        )
    if other := beside_products(model, network):
        raise ValueError(
            "deployed='float32' needs a model that applies Linear layers and activations in turn, "
            "with the weights that it stores, to flat inputs too, and ends in a Linear layer of "
            f"two logits or more; here is {other}, and compiled ones are not covered. Of any other "
            "model, "
            "crcbook.save_model writes the Linear layers that it is read as, and "
            "crcbook.load_model(path).float() is a program of this kind, to deploy in its place"
        )
    if not single_sums_hold(network.device):
        raise ValueError(
            "float32 products on this device are rounded to fewer digits (TF32 or bfloat16): "
            "torch.set_float32_matmul_precision('highest') makes the program one that is covered"
        )
    return replace(Prover.of(network), rounding=DeployedRounding.of(network))


def farthest(prover: Prover) -> float:
    """The distance from an input up to which what a prover proves holds.

    Args:
        prover: of a network or, from :func:`deployed_prover`, of its program.

    Returns:
        Infinity, or ``FARTHEST``.
    """
    return FARTHEST if isinstance(prover.rounding, DeployedRounding) else float("inf")
