r"""The smooth activations crcbook can prove things about, as a table of facts.

A row gives :math:`\sigma`, :math:`\sigma'`, :math:`\sigma''` and the finitely many points where
:math:`\sigma'` and :math:`\sigma''` have local extrema. Every range over an interval, bounded or
not, follows from those points and the two ends; the tests prove the rows from derivatives.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

# float64 evaluations of a row are within ROUNDING of the truth, relative to the larger of the
# function's natural scales: 16 units in the last place, checked against mpmath in the tests.
ROUNDING = 2.0**-49
_STRAIGHT = 40.0  # from here on softplus is the identity in float64


@dataclass(frozen=True)
class Activation:
    r"""One activation function :math:`\sigma` with what the bounds need to know about it.

    Attributes:
        name: the name used by :func:`crcbook.mlp` and the command line.
        value: :math:`\sigma`, elementwise.
        slope: :math:`\sigma'`, elementwise.
        bend: :math:`\sigma''`, elementwise.
        value_extrema: the points where :math:`\sigma` has a local extremum.
        slope_extrema: the points where :math:`\sigma'` has a local extremum.
        bend_extrema: the points where :math:`\sigma''` has a local extremum.
        slope_limits: limits of :math:`\sigma'` at minus and plus infinity.
        value_range: infimum and supremum of :math:`\sigma`, possibly infinite.
        deviation: largest distance between ``value`` and the function torch evaluates
            (``torch.nn.Softplus`` jumps to the identity above its threshold; 0 elsewhere).
        deviates_from: the point below which there is no such distance.
        exponent: b where torch evaluates :math:`e^{bz}` below ``deviates_from``, which may
            overflow though the function does not; 0 elsewhere.
        settings: what torch's module is made with, where the name does not say it all.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    bend: Callable[[Tensor], Tensor]
    value_extrema: tuple[float, ...]
    slope_extrema: tuple[float, ...]
    bend_extrema: tuple[float, ...]
    slope_limits: tuple[float, float]
    value_range: tuple[float, float]
    deviation: float = 0.0
    deviates_from: float = math.inf
    exponent: float = 0.0
    settings: tuple[tuple[str, float | str], ...] = ()

    @cached_property
    def slope_range(self) -> tuple[float, float]:
        r"""Infimum and supremum of :math:`\sigma'` over the line, rounded outward."""
        return _line_range(self.slope, self.slope_extrema, self.slope_limits)

    @cached_property
    def bend_range(self) -> tuple[float, float]:
        r"""Infimum and supremum :math:`h_L, h_U` of :math:`\sigma''` over the line, outward."""
        return _line_range(self.bend, self.bend_extrema, (0.0, 0.0))

    @property
    def max_slope(self) -> float:
        r""":math:`g = \sup|\sigma'|`, rounded upward."""
        return max(map(abs, self.slope_range))

    @property
    def max_bend(self) -> float:
        r""":math:`h = \sup|\sigma''|`, rounded upward."""
        return max(map(abs, self.bend_range))

    @property
    def at_zero(self) -> float:
        r""":math:`|\sigma(0)|`, as evaluated."""
        return abs(value_at(self.value, 0.0))

    def groups(self) -> "Iterator[tuple[Activation, slice]]":
        """The rows of the table in it, each with the units that it is applied to."""
        yield self, slice(None)

    def take(self, units: Tensor) -> "Activation":
        """The activation of some of the units.

        Args:
            units: their positions, ascending.

        Returns:
            The activation.
        """
        return self

    def value_interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        r"""Bounds of :math:`\sigma` over the intervals ``[lower, upper]``, elementwise.

        Args:
            lower: left ends, float64, any shape.
            upper: right ends, the same shape.

        Returns:
            Tensors of that shape: proved lower and upper bounds.
        """
        scale = self.max_slope * torch.maximum(lower.abs(), upper.abs()) + self.at_zero
        return _interval_range(
            self.value, self.value_extrema, self.value_range, lower, upper, scale
        )

    def slope_interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        r"""Bounds of :math:`\sigma'` over the intervals ``[lower, upper]``, elementwise.

        Args:
            lower: left ends, float64, any shape.
            upper: right ends, the same shape.

        Returns:
            Tensors of that shape: proved lower and upper bounds.
        """
        line = self.slope_range
        return _interval_range(self.slope, self.slope_extrema, line, lower, upper, self.max_slope)

    def bend_interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        r"""Bounds of :math:`\sigma''` over the intervals ``[lower, upper]``, elementwise.

        Args:
            lower: left ends, float64, any shape.
            upper: right ends, the same shape.

        Returns:
            Tensors of that shape: proved lower and upper bounds.
        """
        line = self.bend_range
        return _interval_range(self.bend, self.bend_extrema, line, lower, upper, self.max_bend)


@lru_cache(maxsize=256)
def value_at(function: Callable[[Tensor], Tensor], point: float) -> float:
    """What a function of a row is at one of its extrema or at 0, evaluated once.

    Args:
        function: elementwise.
        point: where.

    Returns:
        Its value in float64.
    """
    return float(function(torch.tensor(point, dtype=torch.float64)))


def _line_range(function, extrema, limits) -> tuple[float, float]:
    values = [*function(torch.tensor(extrema, dtype=torch.float64)).tolist(), *limits]
    lowest, highest = min(values), max(values)
    return lowest - ROUNDING * abs(lowest), highest + ROUNDING * abs(highest)


def _interval_range(function, extrema, line_range, lower, upper, scale) -> tuple[Tensor, Tensor]:
    ends = torch.stack([function(lower), function(upper)])
    lowest, highest = ends.amin(0), ends.amax(0)
    for point in extrema:
        inside = (lower <= point) & (point <= upper)
        value = value_at(function, point)
        lowest = torch.where(inside, lowest.clamp(max=value), lowest)
        highest = torch.where(inside, highest.clamp(min=value), highest)
    margin = ROUNDING * scale
    return (lowest - margin).clamp(min=line_range[0]), (highest + margin).clamp(max=line_range[1])


class Arctan(nn.Module):
    """The activation ``atan(z)``, which ``torch.nn`` lacks."""

    def forward(self, z: Tensor) -> Tensor:
        """Return ``atan(z)``, elementwise."""
        return torch.atan(z)


SOFTPLUS_THRESHOLD = 20.0  # torch's own
_SCALES = (1e-20, 1e20)  # of a beta or an alpha


def softplus(beta: float = 1.0, threshold: float = SOFTPLUS_THRESHOLD) -> Activation:
    r"""The row of :math:`\log(1+e^{\beta z})/\beta`.

    Args:
        beta: the sharpness, from 1e-20 to 1e20.
        threshold: where torch goes over to the identity: for :math:`\beta z` above it.

    Returns:
        The row, with the jump of ``torch.nn.Softplus`` at its threshold as ``deviation``.

    Raises:
        ValueError: for another beta, or a threshold below -700 or NaN.
    """
    _check_scale("Softplus", "beta", beta)
    if not threshold >= -700:
        raise ValueError(f"Softplus needs a threshold from -700; got threshold={threshold:g}")
    plain = beta == 1  # which spares two products of all numbers
    return Activation(
        name="softplus",
        value=_softplus if plain else lambda z: _softplus(beta * z) / beta,
        slope=torch.sigmoid if plain else lambda z: torch.sigmoid(beta * z),
        bend=lambda z: beta * torch.sigmoid(beta * z) * torch.sigmoid(-beta * z),
        value_extrema=(),
        slope_extrema=(),
        bend_extrema=(0.0,),
        slope_limits=(0.0, 1.0),
        value_range=(0.0, math.inf),
        deviation=math.log1p(math.exp(-threshold)) / beta * (1 + ROUNDING),
        deviates_from=threshold / beta,
        exponent=beta,
        settings=(("beta", beta), ("threshold", threshold)),
    )


def celu(alpha: float = 1.0, name: str = "celu") -> Activation:
    r"""The row of z above 0 and :math:`\alpha(e^{z/\alpha}-1)` below; ELU where alpha is 1.

    Its slope has no jump; its bend has one at 0, from :math:`1/\alpha` to 0. The theorems need
    no more: only that the bend bounds the Lipschitz constants of the slope.

    Args:
        alpha: from 1e-20 to 1e20.
        name: of the row.

    Returns:
        The row.

    Raises:
        ValueError: for another alpha.
    """
    _check_scale("CELU", "alpha", alpha)
    return Activation(
        name=name,
        value=lambda z: torch.where(z > 0, z, alpha * torch.expm1(z.clamp(max=0) / alpha)),
        slope=lambda z: torch.exp(z.clamp(max=0) / alpha),
        bend=lambda z: torch.exp(z.clamp(max=0) / alpha) / alpha * (z < 0),
        value_extrema=(),
        slope_extrema=(),
        bend_extrema=(-_BESIDE_ZERO,),
        slope_limits=(0.0, 1.0),
        value_range=(-alpha, math.inf),
        settings=(("alpha", alpha),),
    )


def _check_scale(activation: str, name: str, scale: float) -> None:
    if not _SCALES[0] <= scale <= _SCALES[1]:
        raise ValueError(
            f"{activation} needs {name} from {_SCALES[0]:g} to {_SCALES[1]:g}; got {name}={scale:g}"
        )


def _softplus(z: Tensor) -> Tensor:
    if z.dtype == torch.float64:
        return torch.nn.functional.softplus(z, threshold=_STRAIGHT)
    # Five times faster in the dtypes of searches, which lack a vectorised log1p.
    return z.relu() - z.abs().sigmoid().log()


def _sigmoid_bend(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z) * -torch.tanh(z / 2)


def _tanh_slope(z: Tensor) -> Tensor:
    return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)


def _silu_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))


def _silu_bend(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z) * (2 - z * torch.tanh(z / 2))


def _mish_parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """``tanh(softplus(z))`` and its derivative, without cancellation."""
    t = torch.tanh(_softplus(z))
    return t, torch.sigmoid(z) * _tanh_slope(_softplus(z))


def _mish_slope(z: Tensor) -> Tensor:
    t, change = _mish_parts(z)
    return t + z * change


def _mish_bend(z: Tensor) -> Tensor:
    t, change = _mish_parts(z)
    return change * (2 + z * (torch.sigmoid(-z) - 2 * t * torch.sigmoid(z)))


def _gelu_tanh_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of ``z sigmoid(w(z))``: z where w is no line yet, w and its first two derivatives."""
    z = z.clamp(-_SATURATED, _SATURATED)
    square = 3 * _CUBIC * z * z
    rate = 2 * math.sqrt(2 / math.pi)
    return z, rate * z * (1 + square / 3), rate * (1 + square), rate * 6 * _CUBIC * z


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    z, w, rate, _ = _gelu_tanh_parts(z)
    return torch.sigmoid(w) * (1 + z * rate * torch.sigmoid(-w))


def _gelu_tanh_bend(z: Tensor) -> Tensor:
    z, w, rate, change = _gelu_tanh_parts(z)
    bend = 2 * rate + z * (change - rate * rate * torch.tanh(w / 2))
    return torch.sigmoid(w) * torch.sigmoid(-w) * bend


def _softsign_slope(z: Tensor) -> Tensor:
    return 1 / (1 + z.abs()).square()


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


_CUBIC, _SATURATED = 0.044715, 20.0  # of GELU with tanh: a constant, and from where 0 or z
# Where a bend jumps at 0, this close to it on either side it is what it tends to.
_BESIDE_ZERO = 1e-300
_HALF_PI = math.nextafter(math.pi / 2, 2)  # math.pi is below pi
_SIGMOID_BEND = math.log(2 + math.sqrt(3))
# Roots of sigma', sigma'' and sigma''': the positive ones where they come in pairs, and for the
# values of SiLU and both GELUs that of sigma'(-z). A bound evaluated at a point this close to an
# extremum is off by the square of the error, far below ROUNDING.
_SILU_VALUE = 1.2784645427610738
_GELU_VALUE = 0.7517915246935645
_SILU_SLOPE = 2.3993572805154677
_SILU_BEND = 3.4358409935351107
_GELU_TANH_VALUE = 0.7524614220710162
_GELU_TANH_SLOPE = 1.4185040087908284
_GELU_TANH_BEND = 2.0134807246242580
_MISH_VALUE = -1.1924312145154952
_MISH_SLOPES = (-2.2563763963607932, 1.4905711794854284)
_MISH_BENDS = (-3.2673378465204046, -0.08793443131491421, 2.1148425630208772)

ACTIVATIONS: dict[str, Activation] = {
    "softplus": softplus(),
    "sigmoid": Activation(
        name="sigmoid",
        value=torch.sigmoid,
        slope=lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
        bend=_sigmoid_bend,
        value_extrema=(),
        slope_extrema=(0.0,),
        bend_extrema=(-_SIGMOID_BEND, _SIGMOID_BEND),
        slope_limits=(0.0, 0.0),
        value_range=(0.0, 1.0),
    ),
    "tanh": Activation(
        name="tanh",
        value=torch.tanh,
        slope=_tanh_slope,
        bend=lambda z: -2 * torch.tanh(z) * _tanh_slope(z),
        value_extrema=(),
        slope_extrema=(0.0,),
        bend_extrema=(-_SIGMOID_BEND / 2, _SIGMOID_BEND / 2),
        slope_limits=(0.0, 0.0),
        value_range=(-1.0, 1.0),
    ),
    "silu": Activation(
        name="silu",
        value=nn.functional.silu,
        slope=_silu_slope,
        bend=_silu_bend,
        value_extrema=(-_SILU_VALUE,),
        slope_extrema=(-_SILU_SLOPE, _SILU_SLOPE),
        bend_extrema=(-_SILU_BEND, 0.0, _SILU_BEND),
        slope_limits=(0.0, 1.0),
        value_range=(-0.2784645427610738, math.inf),
    ),
    "gelu": Activation(
        name="gelu",
        value=nn.functional.gelu,
        slope=lambda z: torch.special.ndtr(z) + z * _normal_density(z),
        bend=lambda z: (2 - z * z) * _normal_density(z),
        value_extrema=(-_GELU_VALUE,),
        slope_extrema=(-math.sqrt(2), math.sqrt(2)),
        bend_extrema=(-2.0, 0.0, 2.0),
        slope_limits=(0.0, 1.0),
        value_range=(-0.1699712074799037, math.inf),
    ),
    "arctan": Activation(
        name="arctan",
        value=torch.atan,
        slope=lambda z: 1 / (1 + z * z),
        bend=lambda z: -2 * z / (1 + z * z) ** 2,
        value_extrema=(),
        slope_extrema=(0.0,),
        bend_extrema=(-1 / math.sqrt(3), 1 / math.sqrt(3)),
        slope_limits=(0.0, 0.0),
        value_range=(-_HALF_PI, _HALF_PI),
    ),
}

# What a network that is read may contain besides; ``crcbook.mlp`` builds none of them.
OTHER_ACTIVATIONS: dict[str, Activation] = {
    "gelu-tanh": Activation(
        name="gelu-tanh",
        value=lambda z: nn.functional.gelu(z, approximate="tanh"),
        slope=_gelu_tanh_slope,
        bend=_gelu_tanh_bend,
        value_extrema=(-_GELU_TANH_VALUE,),
        slope_extrema=(-_GELU_TANH_SLOPE, _GELU_TANH_SLOPE),
        bend_extrema=(-_GELU_TANH_BEND, 0.0, _GELU_TANH_BEND),
        slope_limits=(0.0, 1.0),
        value_range=(-0.17004075057125408, math.inf),
        settings=(("approximate", "tanh"),),
    ),
    "mish": Activation(
        name="mish",
        value=nn.functional.mish,
        slope=_mish_slope,
        bend=_mish_bend,
        value_extrema=(_MISH_VALUE,),
        slope_extrema=_MISH_SLOPES,
        bend_extrema=_MISH_BENDS,
        slope_limits=(0.0, 1.0),
        value_range=(-0.30884341301725045, math.inf),
    ),
    "elu": celu(name="elu"),
    "logsigmoid": Activation(
        name="logsigmoid",
        value=lambda z: -_softplus(-z),
        slope=lambda z: torch.sigmoid(-z),
        bend=lambda z: -torch.sigmoid(z) * torch.sigmoid(-z),
        value_extrema=(),
        slope_extrema=(),
        bend_extrema=(0.0,),
        slope_limits=(1.0, 0.0),
        value_range=(-math.inf, 0.0),
    ),
    "softsign": Activation(
        name="softsign",
        value=nn.functional.softsign,
        slope=_softsign_slope,
        bend=lambda z: -2 * z.sign() * _softsign_slope(z) / (1 + z.abs()),
        value_extrema=(),
        slope_extrema=(0.0,),
        bend_extrema=(-_BESIDE_ZERO, _BESIDE_ZERO),
        slope_limits=(0.0, 0.0),
        value_range=(-1.0, 1.0),
    ),
}

IDENTITY = Activation(
    name="identity",
    value=lambda z: z,
    slope=torch.ones_like,
    bend=torch.zeros_like,
    value_extrema=(),
    slope_extrema=(),
    bend_extrema=(),
    slope_limits=(1.0, 1.0),
    value_range=(-math.inf, math.inf),
)
