"""Live widgets: they recompute certificates, so they need a running kernel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor, nn

from crcbook.certificate import Certificate, certify
from crcbook.explorer import RadiusField, draw_ball, draw_data, draw_field, radius_field
from crcbook.plots import svg

_BACKGROUND_POINTS = 61


def certificate_at(model: nn.Sequential, x: float, y: float, **options) -> RadiusField:
    """The certificate at one point of the plane: what the sliders call.

    Args:
        model: a classifier of points in the plane.
        x: the first coordinate.
        y: the second coordinate.
        **options: passed on to :func:`crcbook.certify`.

    Returns:
        A field of one point.

    Raises:
        ValueError: as :func:`crcbook.explorer.radius_field`.
    """
    return radius_field(model, [x], [y], **options)


def describe(point: RadiusField) -> str:
    """Say what a certificate promises, the radius rounded down and the distance up.

    Args:
        point: a field of one point.

    Returns:
        One sentence or two.
    """
    label, radius = point.predicted.item(), point.radius.item()
    if np.isinf(radius) and point.targets == "all":
        return f"Every point of the plane is class {label}."
    promise = f"Certified radius {np.floor(radius * 1e3) / 1e3:.3f} around a point of class {label}"
    if point.targets != "all":
        return f"{promise}, against the {point.targets} only: a third class may be nearer."
    if point.exact.item():
        return f"{promise}: exactly the distance to the boundary."
    distance = point.distance.item()
    if np.isnan(distance):
        return f"{promise}. No adversarial point was found."
    away = np.ceil(distance * 1e3) / 1e3
    return f"{promise}. The nearest adversarial point found is {away:.3f} away."


def live_explorer(
    models: nn.Sequential | Mapping[str, nn.Sequential],
    xs: Sequence[float],
    ys: Sequence[float],
    data: tuple[Tensor, Tensor] | None = None,
    **options,
) -> ipywidgets.VBox:
    """Sliders for a point, and its certificate computed anew at every move.

    Args:
        models: a classifier of points in the plane, or several by name to choose among.
        xs: the range of the first coordinate; only its ends matter.
        ys: the range of the second coordinate; only its ends matter.
        data: points ``(items, 2)`` and their classes ``(items,)``, drawn into the figure.
        **options: passed on to :func:`crcbook.certify`.

    Returns:
        The widget; a live notebook displays it.

    Raises:
        ValueError: as :func:`crcbook.explorer.radius_field`.
    """
    models = {"network": models} if isinstance(models, nn.Module) else dict(models)
    grid = [np.linspace(ends[0], ends[-1], _BACKGROUND_POINTS) for ends in (xs, ys)]
    backgrounds = {name: radius_field(model, *grid, **options) for name, model in models.items()}
    choice = ipywidgets.Dropdown(options=list(models), description="network")
    sliders = [_slider(name, ends) for name, ends in zip(("x₁", "x₂"), (xs, ys), strict=True)]
    picture, text = ipywidgets.HTML(), ipywidgets.HTML()

    def redraw(_=None) -> None:
        point = certificate_at(
            models[choice.value], *(slider.value for slider in sliders), **options
        )
        picture.value = _picture(backgrounds[choice.value], point, data)
        text.value = describe(point)

    for control in (choice, *sliders):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([*([choice] if len(models) > 1 else []), *sliders, text, picture])


def _slider(name: str, ends: Sequence[float]) -> ipywidgets.FloatSlider:
    low, high = float(ends[0]), float(ends[-1])
    step = (high - low) / 200
    return ipywidgets.FloatSlider((low + high) / 2, min=low, max=high, step=step, description=name)


def _picture(
    background: RadiusField, point: RadiusField, data: tuple[Tensor, Tensor] | None
) -> str:
    figure, axes = plt.subplots()
    draw_field(axes, background)
    if data is not None:
        draw_data(axes, data)
    axes.autoscale(False)
    draw_ball(axes, point)
    plt.close(figure)
    return svg(figure, describe(point))


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


def live_guess() -> ipywidgets.VBox:
    """Sliders for the dual variable and the solver's steps, and the two radii they give.

    Returns:
        The widget; a live notebook displays it.
    """
    eta = ipywidgets.FloatSlider(0.54, min=0.02, max=0.98, step=0.02, description="η")
    steps = ipywidgets.IntSlider(0, min=0, max=30, description="steps")
    text = ipywidgets.HTML()

    def redraw(_=None) -> None:
        guess = radii_of_a_guess(eta.value, steps.value)
        boundary = np.log(np.e**2 - 1) / 2
        verdict = "broken" if guess.claimed > boundary else "not broken"
        text.value = (
            f"Claimed radius {guess.claimed:.4f}: {verdict} (the boundary is at {boundary:.4f}). "
            f"Proved radius {np.floor(guess.proved * 1e4) / 1e4:.4f}."
        )

    for control in (eta, steps):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([eta, steps, text])


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
    regions = {}
    for suffix, limits in (("", None), (" + box", box)):
        for curvature in ("global", "local"):
            point = certificate_at(model, x, y, box=limits, curvature=curvature)
            radius = point.radius.item()
            outline = np.array([x, y]) + min(radius, widest) * circle
            # Clipping moves the arcs outside onto the box's sides: the outline of the intersection.
            outline = outline if limits is None else outline.clip(lower, upper)
            regions[curvature + suffix] = outline, radius
    return regions


def live_regions(
    model: nn.Sequential, xs: Sequence[float], ys: Sequence[float], box: tuple
) -> ipywidgets.VBox:
    """Sliders for a point in a box, and the four regions certified around it.

    Args:
        model: a classifier of points in the plane.
        xs: the range of the first coordinate; only its ends matter.
        ys: the range of the second coordinate; only its ends matter.
        box: the valid points, as in :func:`crcbook.certify`.

    Returns:
        The widget; a live notebook displays it.

    Raises:
        ValueError: as :func:`crcbook.certify`.
    """
    lower, upper = (np.broadcast_to(np.asarray(end, dtype=np.float64), 2) for end in box)
    margin = 0.2 * (upper - lower).max()
    grid = [
        np.linspace(low - margin, high + margin, _BACKGROUND_POINTS)
        for low, high in zip(lower, upper, strict=True)
    ]
    background = radius_field(model, *grid)
    sliders = [_slider(name, ends) for name, ends in zip(("x₁", "x₂"), (xs, ys), strict=True)]
    picture, text = ipywidgets.HTML(), ipywidgets.HTML()

    def redraw(_=None) -> None:
        point = [slider.value for slider in sliders]
        regions = certified_regions(model, *point, box)
        radii = (f"{name} {np.floor(r * 1e3) / 1e3:.3f}" for name, (_, r) in regions.items())
        text.value = "Certified radii: " + ", ".join(radii) + "."
        figure, axes = plt.subplots()
        draw_field(axes, background)
        axes.add_patch(plt.Rectangle(lower, *(upper - lower), fill=False, ls=":"))
        axes.autoscale(False)
        for name, (outline, _) in regions.items():
            axes.plot(*outline.T, "--" if "box" in name else "-", label=name)
        axes.plot(*point, "o", color=plt.rcParams["text.color"])
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        plt.close(figure)
        picture.value = svg(figure, text.value)

    for slider in sliders:
        slider.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([*sliders, text, picture])


def describe_item(certificate: Certificate, x: Tensor, label: int, item: int = 0) -> str:
    """Say what a certificate promises for one of its inputs, rounded to the safe side.

    Args:
        certificate: the certificate.
        x: ``(batch, *input_shape)`` the inputs it is for.
        label: the input's label.
        item: the input's position.

    Returns:
        One sentence or two.
    """
    radius, target = certificate.radius[item].item(), certificate.target[item].item()
    if radius == 0 and certificate.exact[item]:
        return f"Label {label}, classified as {target}: there is nothing to certify."
    if np.isinf(radius):
        return f"Every valid input is classified as {label}."
    promise = f"Label {label}, certified radius {np.floor(radius * 1e3) / 1e3:.3f} (l2)"
    promise += f", limited by class {target} (bound: {certificate.method[item]})."
    if certificate.exact[item]:
        return f"{promise} It is exact."
    away = (certificate.nearest[item] - x[item].flatten().to(certificate.nearest)).norm().item()
    if np.isnan(away):
        return f"{promise} No adversarial point was found."
    return f"{promise} The nearest adversarial point found is {np.ceil(away * 1e3) / 1e3:.3f} away."


def live_certificate(model: nn.Sequential, x: Tensor, y: Tensor) -> ipywidgets.VBox:
    """Choose an image and options, and see its certificate and its nearest adversarial point.

    Args:
        model: the classifier.
        x: ``(batch, height, width)`` images with pixels in [0, 1].
        y: ``(batch,)`` labels.

    Returns:
        The widget; a live notebook displays it.

    Raises:
        ValueError: as :func:`crcbook.certify`.
    """
    item = ipywidgets.IntSlider(0, min=0, max=len(x) - 1, description="image")
    box = ipywidgets.Checkbox(False, description="pixels stay in [0, 1]")
    choice = ipywidgets.Dropdown(options=["global", "local", "best"], description="bound")
    text, picture = ipywidgets.HTML(), ipywidgets.HTML()

    def redraw(_=None) -> None:
        one, label = x[item.value : item.value + 1], y[item.value : item.value + 1]
        options = {"box": (0.0, 1.0) if box.value else None}
        options |= {"method": "best"} if choice.value == "best" else {"curvature": choice.value}
        certificate = certify(model, one, label, **options)
        text.value = describe_item(certificate, one, label.item())
        figure, axes = plt.subplots(1, 2, figsize=(4.6, 2.4))
        near = certificate.nearest[0].reshape(one[0].shape)
        for ax, image, title in zip(axes, (one[0], near), ("image", "nearest"), strict=True):
            ax.imshow(image.cpu(), cmap="gray_r", vmin=0, vmax=1)
            ax.set(title=title, xticks=[], yticks=[])
        plt.close(figure)
        picture.value = svg(figure, text.value)

    for control in (item, box, choice):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([item, choice, box, text, picture])
