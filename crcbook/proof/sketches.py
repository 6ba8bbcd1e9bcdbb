r"""Cheap bounds of gradients' norms at the inputs, and cheap steps away from them.

What a certificate at the input itself (the closed form) needs of a gradient is a bound of its
norm, for every class of every image. The largest singular directions of the first layer hold most
of it, and what they leave out is bounded. A displacement along them changes the first
preactivations by a product of few columns. All of it is a shortcut: what is computed here could be
computed in full, more slowly.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crcbook.networks import Layer, Network, remembered
from crcbook.proof.arithmetic import DOUBLE, OUTWARD, SINGLE, UNIT, Arithmetic, gamma
from crcbook.proof.eigenvalues import top_eigenvalue_bound
from crcbook.proof.prover import Change, Prover
from crcbook.proof.rounding import MarginFacts, RoundingModel

_SKETCHED = 0.2  # of the largest singular value: what a sketch leaves out is smaller
_FEW_CLASSES = 16  # whose pairs' remainders are prepared: their number grows with the square
_ALIKE = 64  # left singular vectors that slopes are compared with


def _arithmetic(values: Tensor) -> Arithmetic:
    return DOUBLE if values.dtype == torch.float64 else SINGLE


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
        image: ``(outputs, rank)`` WV, as computed.
        shrink: ``(rank,)`` how much shorter the columns of P are than those of :math:`WV`.
    """

    factor: Tensor
    rest: float
    basis: Tensor
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
        return cls(factor, rest, basis, image, shrink)

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
        used = _arithmetic(v)
        terms = used.gamma(v.shape[-1] + self.factor.shape[1] + 24)
        size, image = float(self.factor.norm()), v @ self.factor.to(v.dtype)
        main, length = (row.norm(dim=-1).double() * (1 + terms) for row in (image, v))
        main = main + (terms * size + used.tiny) * length
        rest = (self.rest**0.5 * length).fmin(torch.as_tensor(rest).to(length))
        bound = (main.square() + rest.square()).sqrt()
        bound = bound + used.tiny_norm * (1 + size + self.rest**0.5)
        return image, (bound * OUTWARD).nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass(frozen=True)
class Reduced:
    r"""A float32 network as a function of coordinates u along a sketch's basis.

    With the stored float32 matrices V, of rank r, and A, about :math:`W_1V`, the displacement is
    :math:`d = \mathrm{fl}(Vu)` and :math:`\mathrm{fl}(Au)` stands for :math:`W_1d`. Because
    :math:`\|d - Vu\| \le \gamma_r\|V\|_F\|u\|`, it errs by at most

    .. math:: \bigl(\gamma_r\|A\|_F + \gamma_r\|W_1\|\,\|V\|_F + \|A - W_1V\|_F\bigr) \|u\| .

    Attributes:
        network: its first layer is A.
        basis: ``(n, rank)`` V.
        rate: a bound of what stands before the norm of u.
        norm: a bound of the norm of the first layer's weight.
    """

    network: Network
    basis: Tensor
    rate: float
    norm: float

    @classmethod
    def of(cls, prover: Prover) -> "Reduced":
        """Prepare a network.

        Args:
            prover: the network, which has a sketch and a float32 copy.

        Returns:
            The reduced network.
        """
        assert prover.single is not None  # who has none evaluates in float64 alone
        first, *rest = prover.single.layers
        image, basis, rate = _reduction(prover.network)
        layers = Layer(image, first.bias, first.activation), *rest
        return cls(Network(layers), basis, rate, prover.rounding.norms[0])

    def displaced(self, u: Tensor) -> tuple[Tensor, Change]:
        """Displacements, and how they change the first preactivations.

        Args:
            u: ``(entries, rank)`` float32.

        Returns:
            ``(entries, n)`` and the change.
        """
        error = self.rate * SINGLE.norm(u) + SINGLE.tiny * (1 + self.norm)
        return u @ self.basis.T, Change(self.network.change(u), error * OUTWARD)


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
        used = _arithmetic(s)
        outputs, size = self.basis.shape
        terms, more = used.gamma(size + 8), 1 + used.gamma(outputs + 16)
        c = s @ self.basis
        left = s - c @ self.basis.T
        form = ((c @ self.forms).unflatten(1, (-1, size)) * c[:, None]).sum(2).double()
        form = torch.where(form.isfinite(), form.clamp(min=0), torch.inf)
        length, total = (
            row.norm(dim=1, keepdim=True).double() * more + used.tiny_norm for row in (c, s)
        )
        near = (form + (2 * terms * self.sizes + self.slack) * length.square()).sqrt()
        far = (left.square() @ self.squares.T).double().sqrt() * more
        far = far + terms * (total + float(self.basis.norm()) * length)
        tiny = used.tiny_norm * (1 + length + self.root)
        return (near + self.root * far + tiny) * self.scales * OUTWARD


@dataclass(frozen=True)
class Glance:
    """The quadratics that touch the margins at the inputs, for every class, for little.

    Classes of one input share its hidden layers, and the norm of a gradient is bounded by the
    sketch of the first layer instead of being computed.

    Attributes:
        prover: the network, prepared for proofs.
        sketch: of the first layer's weight; None where it would save nothing.
        remainder: what the sketch leaves out of the gradients of margins, a row a pair of classes;
            None unless there is one hidden layer and few classes.
    """

    prover: Prover
    sketch: NormSketch | None
    remainder: Remainder | None

    @classmethod
    def of(cls, prover: Prover) -> "Glance":
        """Prepare a network.

        Args:
            prover: the network.

        Returns:
            The glance.
        """
        sketch, remainder = _sketch(prover.network), _remainder(prover.network)
        if remainder is not None and prover.single is not None:
            remainder = remainder.to(torch.float32)
        return cls(prover, sketch, remainder)

    def look(
        self, x: Tensor, label: Tensor, target: Tensor, logits: Tensor, slopes: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is seen of the margins of some inputs.

        Args:
            x: ``(batch, n)`` float64 inputs.
            label: ``(batch,)`` classes.
            target: ``(batch, count)`` classes.
            logits: ``(batch, classes)``, as computed in float64.
            slopes: of every hidden layer, from :meth:`Network.logits_and_slopes`.

        Returns:
            ``(batch, count)`` values q, rounded down, and slopes, rounded upward; and ``(batch,
            count, rank)`` gradients along the sketch's basis, as computed, rank 0 without one.
        """
        network, rounding = self.prover.network, self.prover.rounding
        own, other = logits.gather(1, label[:, None]), logits.gather(1, target)
        facts = self._facts(label, target)
        forward = rounding.forward(*rounding.first(x.norm(dim=1, keepdim=True) + DOUBLE.tiny_norm))
        lost = forward.value_error(facts, forward.size + forward.error) + facts.deviation
        lost = lost + rounding.gap_at(x)[:, None]
        lost = (lost + 8 * DOUBLE.unit * (own.abs() + other.abs() + facts.offset)) * OUTWARD
        _, slope_error = forward.gradient_errors(facts)
        slope_error = slope_error + rounding.gap[0]
        if self.sketch is None:
            units = network.units(slopes, label, target, x.dtype)
            slope, image = DOUBLE.norm(network.input_gradient(units)), units[..., :0]
        else:
            quick = x.dtype if self.prover.single is None else torch.float32
            rest = torch.inf
            if self.remainder is not None:
                rest = self.remainder.norms(slopes[0].to(self.remainder.basis.dtype))
                rest = rest.gather(1, _pair_position(label[:, None], target, network.classes))
            units = network.units(slopes, label, target, quick)
            image, slope = self.sketch.norms(units, rest)
        return own - other - lost, (slope + slope_error) * OUTWARD, image

    def _facts(self, label: Tensor, target: Tensor) -> MarginFacts:
        """Each logit and each row errs by its own; the sums bound what a difference of two can."""
        last = self.prover.network.layers[-1]
        sizes = (
            last.bias.abs(),
            self.prover.rounding.deviation(last.weight),
            last.weight.norm(dim=1),
        )
        sums = (column[label, None] + column[target] for column in sizes)
        offset, deviation, rows = sums
        return MarginFacts(offset, deviation, rows, rows, rows)

    def lowest(self, label: Tensor, target: Tensor) -> Tensor:
        """Lower bounds of margins over all of R^n, from the range of the last activation.

        Args:
            label: ``(entries,)`` classes.
            target: ``(entries,)`` classes.

        Returns:
            ``(entries,)``; minus infinity where there is none.
        """
        network = self.prover.network
        if any(self.prover.rounding.gap):  # which grows without end
            return torch.full_like(network.layers[-1].bias[label], -torch.inf)
        label, target, place = network.distinct_pairs(label, target)
        weights, bias = network.margin_weights(label, target), network.layers[-1].bias
        offset = bias[label] - bias[target]
        if len(network.layers) == 1:
            return torch.where((weights == 0).all(1), offset, -torch.inf)[place]
        lowest = torch.empty_like(weights)
        for row, units in network.layers[-2].activation.groups():
            (low, high), own = row.value_range, weights[:, units]
            lowest[:, units] = torch.where(own > 0, own * low, own * high)
        lowest = torch.where(weights == 0, 0.0, lowest)
        size = lowest.abs().sum(1) + 2 * (bias[label].abs() + bias[target].abs())
        lowest = lowest.sum(1) + offset - gamma(weights.shape[1] + 8) * size
        lowest = lowest - self.prover.rounding.deviation(weights)
        return torch.where(lowest.isnan(), -torch.inf, lowest)[place]


@remembered
def _sketch(network: Network) -> NormSketch | None:
    return NormSketch.of(network.layers[0].weight) if len(network.layers) > 1 else None


@remembered
def _remainder(network: Network) -> Remainder | None:
    sketch, (first, *rest) = _sketch(network), network.layers
    if sketch is None or len(rest) > 1 or network.classes > _FEW_CLASSES:
        return None
    # Slopes follow the preactivations, which move along the left singular vectors.
    alike = torch.ones_like(first.bias), first.activation.slope(first.bias)
    near = torch.cat([torch.stack(alike, dim=1), sketch.image[:, -_ALIKE:]], dim=1)
    classes = torch.arange(network.classes, device=network.device)
    rows = network.margin_weights(*torch.combinations(classes).T)
    return Remainder.of(first.weight, sketch, rows, near)


def _pair_position(label: Tensor, target: Tensor, classes: int) -> Tensor:
    """Where pairs of different classes are among all, in whichever order."""
    low, high = label.minimum(target), label.maximum(target)
    return low * (2 * classes - low - 1) // 2 + high - low - 1


@remembered
def _reduction(network: Network) -> tuple[Tensor, Tensor, float]:
    """A, V and the rate of :class:`Reduced`."""
    sketch, weight = _sketch(network), network.layers[0].weight
    assert sketch is not None
    image, basis = sketch.image.float(), sketch.basis.float()
    apart = float((image.double() - weight @ basis.double()).norm())
    sizes = [float(matrix.double().norm()) for matrix in (weight, image, basis)]
    apart = apart + gamma(weight.shape[1] + 4) * sizes[0] * sizes[2] + 4 * UNIT * sizes[1]
    norm = RoundingModel.of(network).norms[0]
    terms = SINGLE.gamma(basis.shape[1] + 2)
    return image, basis, (terms * (sizes[1] + norm * sizes[2]) + apart) * OUTWARD * OUTWARD
