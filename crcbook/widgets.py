"""Live widgets: they recompute certificates, so they need a running kernel."""

from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor, nn

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
