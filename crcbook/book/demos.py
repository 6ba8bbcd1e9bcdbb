"""What the chapters show of the proofs' inner workings, without a picture.

A chapter prints or plots what these return; :mod:`crcbook.book.widgets` puts sliders to them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from crcbook.attacks import Aim, boundary_points, descend
from crcbook.certificate import certify, curvature_bounds
from crcbook.certificate.question import Radius
from crcbook.datasets import Split
from crcbook.hessian import margin_hessian
from crcbook.networks import mlp, read_network
from crcbook.proof.lines import crown_margin
from crcbook.proof.lipschitz import lipschitz_bound
from crcbook.proof.paths import Neighbourhood
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.slabs import slab_margins
from crcbook.stages.search import search
from crcbook.training import Recipe, train
from crcbook.training.losses import ibp_margins

_DESCENT_STEPS = 2000  # at most, of an inner problem in one or two dimensions
_SMALL_RESIDUAL = 1e-9  # of a gradient: where a descent ends
_FIXED_POINT_STEPS = 60  # towards a good point of expansion
_SEARCH_STEPS = 100  # as many as the package's own search takes at most


@dataclass(frozen=True)
class DualPoint:
    r"""One value of the dual of the distance to a boundary.

    Attributes:
        eta: the multiplier :math:`\eta`.
        point: ``(n,)`` the inner minimiser found.
        margin: the margin there; its sign says on which side the best multiplier lies.
        value: a lower bound of :math:`d(\eta)`, whether or not the minimiser has converged.
        radius: :math:`\sqrt{2\,\mathrm{value}}`, certified; 0 where the value is negative.
    """

    eta: float
    point: np.ndarray
    margin: float
    value: float
    radius: float


def dual_at(
    model: nn.Sequential, x0: Sequence[float], eta: float, label: int = 0, target: int = 1
) -> DualPoint:
    r"""The dual :math:`d(\eta) = \min_x \|x - x_0\|^2/2 + \eta f(x)`.

    Gradient descent finds the minimiser; what it leaves of the gradient is subtracted,
    :math:`\varphi(c) - \|\nabla\varphi(c)\|^2/(2(1 - \eta|m|))`. Rounding is not.

    Args:
        model: a classifier, as :func:`crcbook.certify` takes it.
        x0: ``(n,)`` the input.
        eta: the multiplier, at least 0 and below :math:`1/|m|`.
        label: a class.
        target: another class.

    Returns:
        The value and where it was found.

    Raises:
        ValueError: for a multiplier out of range.
    """
    m, top = (bound.item() for bound in curvature_bounds(model, label, target))
    if not (eta >= 0 and 1 + eta * m > 0):
        raise ValueError(f"eta must be at least 0 and below 1/|m| = {-1 / m:g}; got {eta:g}")
    network = read_network(model)
    pair = torch.tensor([[label], [target]], device=network.device)
    start = torch.as_tensor(x0, dtype=torch.float64, device=network.device).reshape(1, -1)
    point = start.clone()
    for _ in range(_DESCENT_STEPS):
        margin, gradient = network.margin_and_gradient(point, *pair)
        residual = point - start + eta * gradient
        if residual.norm() < _SMALL_RESIDUAL:
            break
        point = point - residual / (1 + eta * top)
    margin, gradient = network.margin_and_gradient(point, *pair)
    residual = point - start + eta * gradient
    value = (point - start).square().sum() / 2 + eta * margin
    value = (value - residual.square().sum() / (2 * (1 + eta * m))).item()
    radius = math.sqrt(2 * max(value, 0.0))
    return DualPoint(eta, point[0].numpy(force=True), margin.item(), value, radius)


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a margin's Hessian at a point, with the bounds for all points.

    Attributes:
        eigenvalues: ``(n,)`` increasing.
        lowest: the proved lower bound m.
        highest: the proved upper bound M.
    """

    eigenvalues: np.ndarray
    lowest: float
    highest: float


def spectrum_at(model: nn.Sequential, x: Tensor, label: int, target: int) -> Spectrum:
    """The spectrum of a margin's Hessian.

    Args:
        model: a classifier, as :func:`crcbook.certify` takes it.
        x: one input, of any shape with n elements.
        label: a class.
        target: another class.

    Returns:
        The eigenvalues and their bounds.
    """
    m, top = (bound.item() for bound in curvature_bounds(model, label, target))
    hessian = margin_hessian(model, x.reshape(1, -1), label, target)[0]
    return Spectrum(torch.linalg.eigvalsh(hessian).cpu().numpy(), m, top)


@dataclass(frozen=True)
class Guess:
    r"""What a point says about the dual of the margin ``2 - softplus(2 x)`` at 0.

    Attributes:
        eta: the dual variable, in (0, 1).
        point: where the inner solver stands.
        value: :math:`\varphi` there.
        slope: :math:`\varphi'` there.
    """

    eta: float
    point: float
    value: float
    slope: float

    @property
    def claimed(self) -> float:
        """The radius if the value were the minimum; no bound."""
        return float(np.sqrt(2 * max(self.value, 0.0)))

    @property
    def proved(self) -> float:
        r"""The radius of :math:`\varphi - \varphi'^2/2\mu`, which is below the minimum."""
        bound = self.value - self.slope**2 / (2 * (1 - self.eta))
        return float(np.sqrt(2 * max(bound, 0.0)))


def radii_of_a_guess(eta: float, steps: int) -> Guess:
    r"""Gradient descent on :math:`\varphi(x) = x^2/2 + \eta (2 - \mathrm{softplus}(2x))`.

    The margin's second derivative is at least -1, so :math:`\varphi'' \ge 1 - \eta`.

    Args:
        eta: the dual variable, in (0, 1).
        steps: how many steps of length 1/2 from 0.

    Returns:
        Where the solver stands.
    """
    point = 0.0
    for step in range(steps + 1):
        value = point**2 / 2 + eta * (2 - np.logaddexp(0, 2 * point))
        slope = point - 2 * eta / (1 + np.exp(-2 * point))
        if step < steps:
            point -= slope / 2
    return Guess(eta, float(point), float(value), float(slope))


def certified_regions(
    model: nn.Sequential, x: float, y: float, box: tuple
) -> dict[str, tuple[np.ndarray, float]]:
    """What each of four certificates proves around a point of the plane.

    Args:
        model: a classifier of points in the plane.
        x: the first coordinate.
        y: the second coordinate.
        box: the valid points, as in :func:`crcbook.certify`; the point must be one of them.

    Returns:
        By name, with global and local curvature, without and with the box: the outline
        ``(points, 2)`` of the region, and the radius.

    Raises:
        ValueError: as :func:`crcbook.certify`.
    """
    angle = np.linspace(0, 2 * np.pi, 181)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    lower, upper = (np.broadcast_to(np.asarray(end, dtype=np.float64), 2) for end in box)
    widest = float(np.linalg.norm(upper - lower))
    network = read_network(model)
    point = torch.tensor([[x, y]], dtype=torch.float64, device=network.device)
    label = network.logits(point).argmax(1)
    regions = {}
    for suffix, limits in (("", None), (" + box", box)):
        for curvature in ("global", "local"):
            radius = certify(
                model, point, label, box=limits, curvature=curvature, method="dual"
            ).radius.item()
            outline = np.array([x, y]) + min(radius, widest) * circle
            # Clipping moves the arcs outside onto the box's sides: the outline of the intersection.
            outline = outline if limits is None else outline.clip(lower, upper)
            regions[curvature + suffix] = outline, radius
    return regions


def margins_in_balls(
    model: nn.Sequential, x: Tensor, label: int, radii: Sequence[float]
) -> dict[str, np.ndarray]:
    r"""Lower bounds of the worst margin in growing l2 balls, by every method of the book.

    ``"intervals"``, ``"Lipschitz"``, ``"lines"`` (CROWN), ``"closed form"`` and ``"dual"``, whose
    points c follow :math:`x_0 - \nabla f(c)/\max(\|\nabla f(c)\|/\rho, 1.02k)`, and under
    ``"a point inside"`` the margin at that point, an upper bound. Only the lines' bound, and the
    constants L and k, account for rounding.

    Args:
        model: a classifier with monotone activations, as :func:`crcbook.certify` takes it.
        x: one input, of any shape.
        label: its class.
        radii: the balls' radii, positive.

    Returns:
        ``(len(radii),)`` values by name: the smallest over the other classes.
    """
    network = read_network(model)
    prover, device = Prover.of(network), network.device
    x = x.detach().reshape(1, -1).to(device, torch.float64)
    others = torch.tensor([t for t in range(network.classes) if t != label], device=device)
    rho = torch.as_tensor(radii, dtype=torch.float64, device=device)
    rho = rho.repeat_interleave(len(others))
    target = others.repeat(len(radii))
    centre, labels = x.expand(len(rho), -1), torch.full_like(target, label)
    f, gradient = network.margin_and_gradient(centre, labels, target)
    k = -curvature_bounds(model, label, others)[0].repeat(len(radii))
    intervals = [ibp_margins(network.layers, x, labels[:1], float(r))[0, others] for r in radii]
    margins = {
        "intervals": torch.cat(intervals),
        "Lipschitz": f - rho * lipschitz_bound(prover, labels, target),
        "lines": crown_margin(prover, centre, labels, target, rho),
        "closed form": f - rho * gradient.norm(dim=1) - k / 2 * rho**2,
    }
    point = centre
    for _ in range(_FIXED_POINT_STEPS):
        _, gradient = network.margin_and_gradient(point, labels, target)
        scale = torch.maximum(gradient.norm(dim=1) / rho, 1.02 * k).clamp(min=1e-30)
        point = centre - gradient / scale[:, None]
    value, gradient = network.margin_and_gradient(point, labels, target)
    away = centre - point
    start = value + (gradient * away).sum(1) - k / 2 * away.square().sum(1)
    dual = start - rho * (k[:, None] * away - gradient).norm(dim=1) - k / 2 * rho**2
    margins["dual"] = torch.maximum(dual, margins["closed form"])
    margins["a point inside"] = value
    return {
        name: m.reshape(len(radii), -1).amin(1).numpy(force=True) for name, m in margins.items()
    }


def radii_where_positive(
    margins: Mapping[str, np.ndarray], radii: Sequence[float]
) -> dict[str, float]:
    """The largest of the radii at which each bound is positive.

    Args:
        margins: as from :func:`margins_in_balls`.
        radii: theirs.

    Returns:
        A radius a name; 0 where no bound is positive.
    """
    return {
        name: float(np.max(np.asarray(radii), where=values > 0, initial=0.0))
        for name, values in margins.items()
    }


def local_margins(
    model: nn.Sequential, x: Tensor, label: int, target: int, radius: float
) -> dict[str, float]:
    """Lower bounds of a margin in a ball by three uses of curvature, and what an attack reaches.

    Args:
        model: the classifier, with a hidden layer.
        x: an input, of any shape.
        label: its label.
        target: another class.
        radius: the ball's l2 radius.

    Returns:
        By name: the bounds with the curvature of all of space, with that of the ball, and
        following the curvature outward, and the smallest margin an attack finds in the ball.

    Raises:
        ValueError: as :func:`crcbook.certify`.
    """
    prover = Prover.of(read_network(model))
    x = x.reshape(1, -1).to(prover.network.device, torch.float64)
    one, other = torch.tensor([[label], [target]], device=x.device).unbind()
    pair = one, other
    value, gradient = prover.network.margin_and_gradient(x, *pair)
    place = Neighbourhood.of(prover, x[0], radius)
    whole = -curvature_bounds(model, one, other)[0]
    inside = -curvature_bounds(model, one, other, x=x, radius=radius)[0]
    first_order = value - radius * gradient.norm()
    _, reached = descend(Aim(prover.network, x, *pair), radius, x)
    return {
        "global k": (first_order - whole * radius**2 / 2).item(),
        "k of the ball": (first_order - inside * radius**2 / 2).item(),
        "followed outward": place.margin(Entries.of(prover, x, *pair)).item(),
        "attack": reached.item(),
    }


def radii_with(model: nn.Sequential, x: Tensor, y: Tensor, k: Tensor, steps: int = 40) -> Tensor:
    r"""Radii by the theorem of second order with any curvature bound that one hands in.

    At the input, the point of expansion of the closed form, and then ever closer to the parabola's
    own zero: where that zero lies on the boundary, no other point proves more. In plain float64,
    no rounding subtracted.

    Args:
        model: the classifier.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` labels.
        k: ``(classes, classes)`` the curvature bound of each label and other class, positive off
            the diagonal.
        steps: how often the point of expansion moves; 0 for the closed form.

    Returns:
        ``(batch,)`` the largest radius found against the nearest class.

    Raises:
        ValueError: for a model that is no network of linear layers and known activations.
    """
    network = read_network(model)
    x = x.flatten(1).double()
    others = torch.arange(len(k)) != y[:, None]
    item, target = others.nonzero(as_tuple=True)
    x0, label = x[item], y[item]
    bound, c, best = k[label, target], x0, torch.zeros(len(item), dtype=torch.float64)
    for _ in range(steps + 1):
        value, gradient = network.margin_and_gradient(c, label, target)
        away = x0 - c
        q = value + (gradient * away).sum(1) - bound / 2 * away.square().sum(1)
        s = bound[:, None] * away - gradient
        slope, q = s.norm(dim=1), q.clamp(min=0)
        radius = 2 * q / (slope + (slope**2 + 2 * bound * q).sqrt())
        best = torch.maximum(best, radius)
        # Half of the way: where the margin bends nearly as much as k allows, whole steps circle.
        c = (c + x0 + radius[:, None] * nn.functional.normalize(s, dim=1)) / 2
    return best.reshape(len(x), -1).amin(1)


def slab_radii(
    model: nn.Sequential, x: Tensor, label: Tensor, target: Tensor, slabs: int
) -> tuple[Tensor, Tensor]:
    """Radii proved by cutting balls into slabs alone, and what an attack reaches.

    Args:
        model: the classifier, with a hidden layer.
        x: ``(batch, *input_shape)`` inputs.
        label: ``(batch,)`` their labels.
        target: ``(batch,)`` the classes to keep away.
        slabs: how many.

    Returns:
        ``(batch,)`` radii, and distances of adversarial points: NaN where none was found.

    Raises:
        ValueError: as :func:`crcbook.certify`.
    """
    prover = Prover.of(read_network(model))
    network = prover.network
    x = x.flatten(1).to(network.device, torch.float64)
    label, target = label.to(x.device), target.to(x.device)
    entries = Entries.of(prover, x, label, target)
    reached = (boundary_points(Aim(network, x, label, target)) - x).norm(dim=1)
    # Beyond what the attack reaches, so that nothing but the proofs can end below it.
    high = 1.25 * reached.nan_to_num(nan=x.norm(dim=1).max().item())
    low, nowhere = torch.zeros_like(high), torch.zeros_like(x)
    towards = search(network, Radius(), entries, nowhere, _SEARCH_STEPS)
    for _ in range(10):
        middle = (low + high) / 2
        proved = slab_margins(prover, replace(entries, valid=middle), towards, slabs) > 0
        low, high = torch.where(proved, middle, low), torch.where(proved, high, middle)
    return low, reached


def trained_at(data: Split, gamma: float, radius: float, epochs: int = 40) -> nn.Sequential:
    """A small network trained by CRT in the plane.

    Args:
        data: points of the plane and their classes.
        gamma: the weight of the curvature.
        radius: the l2 radius of the attacks.
        epochs: passes over the data.

    Returns:
        The network, in float64; the same weights for the same arguments.
    """
    model = mlp([2, 32, int(data.y.max()) + 1], seed=0)
    recipe = Recipe(
        "crt", radius=radius, gamma=gamma, epochs=epochs, batch_size=100, learning_rate=0.05
    )
    train(model, data, recipe)
    return model.double()
