r"""The trusted core: here a point becomes a bound.

:meth:`Prover.prove` evaluates margins and gradients at points :math:`c = x_0 + d`, in float64 or
float32, and returns the quadratics of :mod:`crcbook.proof.quadratic` with everything subtracted
that rounding can have done. It asks for no property of the points: whoever chose them need not be
trusted.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from crcbook.networks import Network
from crcbook.proof.arithmetic import DOUBLE, OUTWARD, Arithmetic, single_sums_hold
from crcbook.proof.box import Allowed
from crcbook.proof.curvature import downward_curvature
from crcbook.proof.quadratic import Quadratic
from crcbook.proof.rounding import MarginFacts, RoundingModel


@dataclass(frozen=True)
class Entries:
    """Margins to bound: an input, its label, and another class each.

    Attributes:
        index: ``(entries,)`` where they are in the table of bounds.
        image: ``(entries,)`` which input of the table they belong to.
        label: ``(entries,)`` classes.
        target: ``(entries,)`` classes.
        curvature: ``(entries,)`` float64, proved bounds k.
        valid: ``(entries,)`` float64, the l2 distance within which k holds; infinity for R^n.
        x: ``(entries, n)`` float64, the inputs.
        z: ``(entries, width)`` float64, the first layer's preactivations there, as computed.
        z_error: ``(entries,)`` bounds of their error, in the l2 norm.
        gap: ``(entries,)`` how far the margins there can be from those of the model that
            the network was read from.
        bound: ``(entries,)`` what is proved of them already.
        goal: ``(entries,)`` bounds that are good enough; infinity where none is.
        start: ``(entries, n)`` displacements from which to search on.
        way: ``(entries, rank)`` the gradients at the inputs along a few directions, for a first
            step; rank 0 where they are not known.
        allowed: the displacements that the box leaves; None for all.
    """

    index: Tensor
    image: Tensor
    label: Tensor
    target: Tensor
    curvature: Tensor
    valid: Tensor
    x: Tensor
    z: Tensor
    z_error: Tensor
    gap: Tensor
    bound: Tensor
    goal: Tensor
    start: Tensor
    way: Tensor
    allowed: Allowed | None = None

    @classmethod
    def of(
        cls,
        prover: "Prover",
        x: Tensor,
        label: Tensor,
        target: Tensor,
        allowed: Allowed | None = None,
    ) -> "Entries":
        """Margins of inputs, one each, with their curvature over all of R^n.

        Args:
            prover: the network, prepared for proofs.
            x: ``(entries, n)`` float64.
            label: ``(entries,)`` classes.
            target: ``(entries,)`` classes.
            allowed: the displacements that the box leaves; None for all.

        Returns:
            The entries, of which nothing is proved yet and for which nothing is good enough.
        """
        index = torch.arange(len(x), device=x.device)
        infinite = torch.full_like(x[:, 0], torch.inf)
        z, z_error = prover.network.first(x), prover.rounding.first_error(x)
        k = downward_curvature(prover.network, label, target)
        start, way = torch.zeros_like(x, dtype=prover.rough.dtype), x[:, :0].float()
        off = prover.rounding.gap_at(x)
        columns = index, index, label, target, k, infinite, x, z, z_error, off, -infinite, infinite
        return cls(*columns, start, way, allowed)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.index)

    def take(self, index: Tensor) -> "Entries":
        """The entries at ``index``.

        Args:
            index: positions or a mask.

        Returns:
            The chosen entries.
        """
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        names = (field.name for field in fields(self)[:-1])
        columns = {name: getattr(self, name).index_select(0, index) for name in names}
        allowed = None if self.allowed is None else self.allowed.take(index)
        return Entries(**columns, allowed=allowed)

    def hold(self, d: Tensor, length: Tensor) -> Tensor:
        """Whether the entries' curvatures hold at displacements, and from there to all others.

        Args:
            d: ``(entries, n)`` displacements.
            length: ``(entries,)`` at least their lengths.

        Returns:
            ``(entries,)`` bool: where a curvature is one of a ball, only in that ball and the box.
        """
        holds = ~(length > self.valid)
        if self.allowed is not None:
            holds &= self.valid.isinf() | self.allowed.contains(d)
        return holds

    def to(self, dtype: torch.dtype) -> "Entries":
        """The same entries for steps in another precision, with what steps need alone.

        Args:
            dtype: a floating-point dtype.

        Returns:
            The entries, with rounded preactivations and box, and no numbers of the inputs.
        """
        allowed = None if self.allowed is None else self.allowed.to(dtype)
        x, start, way = (whole[:, :0] for whole in (self.x, self.start, self.way))
        return replace(self, z=self.z.to(dtype), x=x, start=start, way=way, allowed=allowed)


@dataclass(frozen=True)
class Change:
    """How displacements change the first preactivations, known without the first layer's product.

    Attributes:
        value: ``(entries, width)`` in the format of the evaluation.
        error: ``(entries,)`` float64 bounds of how far it is from the product, in the l2 norm.
    """

    value: Tensor
    error: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What was computed at the points of some entries.

    Attributes:
        margin: ``(entries,)`` float64.
        along: ``(entries,)`` float64, the gradients times the displacements.
        gradient: ``(entries, n)``, in the format of the evaluation.
        parts: the displacements, the first preactivations, their change, the last activations, and
            the gradients in the first preactivations; ``(entries, width)`` each.
    """

    margin: Tensor
    along: Tensor
    gradient: Tensor
    parts: tuple[Tensor, ...]


def evaluate(
    network: Network,
    entries: Entries,
    d: Tensor,
    change: Tensor | None = None,
    offset: Tensor | None = None,
) -> Evaluation:
    """Margins and gradients at displaced inputs, without any error bounds.

    Args:
        network: the network, in any precision.
        entries: the margins.
        d: ``(entries, n)`` displacements, in the network's precision.
        change: ``(entries, width)`` what they change of the first preactivations, if it is known.
        offset: ``(entries,)`` differences of the last biases; None for the network's.

    Returns:
        The evaluation.
    """
    change = network.change(d) if change is None else change
    z = entries.z.to(d.dtype) + change
    active, slopes = network.forward(z)
    weights = network.margin_weights(entries.label, entries.target)
    if offset is None:
        bias = network.layers[-1].bias
        offset = bias[entries.label] - bias[entries.target]
    margin = (weights * active).sum(1).double() + offset
    units = network.backward(weights, slopes)
    along = (units * change).sum(1).double()
    return Evaluation(margin, along, network.input_gradient(units), (d, z, change, active, units))


@dataclass(frozen=True)
class Prover:
    """A network prepared for proofs.

    Attributes:
        network: the float64 network.
        rounding: the error bounds of its evaluations.
        single: the network in float32, where float32 is what it should be; otherwise None.
        rough: the network for searches: in float32, if that holds its sizes.
    """

    network: Network
    rounding: RoundingModel
    single: Network | None
    rough: Network

    @classmethod
    def of(cls, network: Network) -> "Prover":
        """Prepare a network.

        Args:
            network: the float64 network.

        Returns:
            The prover.
        """
        rough, single = network.rough, None
        if single_sums_hold(network.device):
            single = rough if rough.dtype == torch.float32 else network.to(torch.float32)
        return cls(network, RoundingModel.of(network), single, rough)

    def prove(
        self,
        entries: Entries,
        d: Tensor,
        arithmetic: Arithmetic = DOUBLE,
        change: Change | None = None,
    ) -> tuple[Quadratic, Evaluation]:
        r"""The quadratics below some margins that touch them at :math:`c = x_0 + d`.

        Where the network had to be rounded when it was read, it is within :math:`\alpha\|x\| +
        \beta` of the model, which a steeper and lower quadratic makes up for.

        With :math:`F_1 = \|W_1\|_F`: the change :math:`W_1 d` of the first preactivations errs by
        :math:`\gamma_{n+4} F_1 \|d\|`, and adding it to those at the input by 4u times the sizes of
        both; :math:`\nabla f \cdot d` is evaluated as v times that change, with the gradient v in
        the preactivations. Where the points lie beyond what the curvatures are valid for, nothing
        is proved.

        Args:
            entries: the margins.
            d: ``(entries, n)`` displacements, in the format.
            arithmetic: the format to evaluate in.
            change: :math:`W_1 d`, where it is known otherwise; its own error takes the place of
                the first one above.

        Returns:
            The quadratics, minus infinity where something overflowed, and what they are made of.
        """
        network = self.network if arithmetic is DOUBLE else self.single
        if network is None:
            raise ValueError("a network without a float32 copy is evaluated in float64 alone")
        if entries.allowed is not None and entries.allowed.low.dtype != torch.float64:
            raise ValueError("a box that a search has rounded is not the box any more")
        k, facts = entries.curvature, MarginFacts.of(self.rounding, entries.label, entries.target)
        value = None if change is None else change.value
        found = evaluate(network, entries, d, value, facts.offset)
        margin, along, gradient = found.margin, found.along, found.gradient
        length, *sizes = map(arithmetic.norm, found.parts)
        steepness = arithmetic.norm(gradient)
        moved = self.rounding.change(length, arithmetic) if change is None else change.error
        errors = self._errors(entries, facts, arithmetic, (length, *sizes), moved)
        # The offset and its sum with the margin, the bend's square and product, three differences:
        # no term is rounded more than five times, in float64.
        bend = k * length.square()
        rounded = margin.abs() + facts.offset.abs() + along.abs() + bend
        lost = errors[0] + entries.gap + 8 * DOUBLE.unit * rounded
        value = margin - along - bend / 2 - lost * OUTWARD
        direction = -torch.addcmul(gradient, k[:, None].to(d.dtype), d)
        # k is rounded, multiplied and added: three roundings of kd, one of the gradient.
        error = errors[1] + 4 * arithmetic.unit * (steepness + k * length)
        error = error + arithmetic.tiny * length + self.rounding.gap[0]
        usable = error.isfinite() & steepness.isfinite() & entries.hold(d, length)
        value = torch.where(usable & value.isfinite(), value, -torch.inf)
        quadratic = Quadratic(value, direction, error, k, entries.allowed, arithmetic)
        return quadratic, found

    def _errors(
        self,
        entries: Entries,
        facts: MarginFacts,
        used: Arithmetic,
        sizes: tuple[Tensor, ...],
        moved: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Bounds of the errors of q and of s, but for the last sums; infinite on overflow."""
        length, z, change, active, units = sizes
        # z at the input is rounded to the format, and their sum: at most (z + change) + z of units.
        start = entries.z_error + moved + 4 * used.unit * (z + change)
        forward = self.rounding.forward(z, start, used)
        value = forward.value_error(facts, active) + facts.deviation
        unit_slack, slope = forward.gradient_errors(facts, units)
        terms = used.gamma(entries.z.shape[1] + 4)
        along = (unit_slack + terms * units) * change + (units + unit_slack) * moved
        fits = forward.largest * (1 + facts.rows) * (1 + units) * (1 + length) < used.largest
        value, slope = (
            torch.where(fits, bound * OUTWARD + used.tiny, torch.inf)
            for bound in (value + along, slope)
        )
        return value, slope

    def margin_at(self, entries: Entries, point: Tensor) -> tuple[Tensor, Tensor]:
        """Margins of entries at points, and bounds of how far they are from the true ones.

        Args:
            entries: the margins.
            point: ``(entries, n)`` float64.

        Returns:
            ``(entries,)`` each, the second with the deviation of torch's own evaluation.
        """
        active = self.network.active(point)
        margin = self.network.margin(active, entries.label, entries.target)
        return margin, self.margin_error(entries.label, entries.target, point)

    def margin_error(self, label: Tensor, target: Tensor, point: Tensor) -> Tensor:
        """How far margins evaluated in float64 can be from the true ones.

        Args:
            label: ``(entries,)`` classes.
            target: ``(entries,)`` classes.
            point: ``(entries, n)`` float64, the points of evaluation.

        Returns:
            ``(entries,)``, with the deviation of torch's own evaluation.
        """
        facts = MarginFacts.of(self.rounding, label, target)
        size = point.norm(dim=1) + DOUBLE.tiny_norm
        forward = self.rounding.forward(*self.rounding.first(size))
        active = forward.size + forward.error
        error = forward.value_error(facts, active) + facts.deviation
        error = error + self.rounding.gap_at(point)
        # The offset, its sum with the product, and the sum that is compared with 0: three each.
        sums = 8 * DOUBLE.unit * (facts.norm * active + facts.offset.abs())
        return (error + sums) * OUTWARD
