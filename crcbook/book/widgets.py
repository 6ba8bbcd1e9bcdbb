"""Live widgets: they recompute certificates, so they need a running kernel."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, display
from torch import Tensor, nn

from crcbook.activations import ACTIVATIONS
from crcbook.attacks import attack
from crcbook.book.demos import (
    DualPoint,
    Spectrum,
    certified_regions,
    dual_at,
    local_margins,
    margins_in_balls,
    radii_of_a_guess,
    radii_where_positive,
    spectrum_at,
    trained_at,
)
from crcbook.book.explorer import (
    RadiusField,
    draw_ball,
    draw_data,
    draw_field,
    draw_ring,
    radius_field,
    radius_fields,
)
from crcbook.book.plots import PALETTE, building_the_book, svg
from crcbook.certificate import Certificate, certify, curvature_bounds
from crcbook.datasets import Split
from crcbook.networks import read_network

_BACKGROUND_POINTS = 61  # a side of the grid that is certified anew with a network
_RINGS = ("--", ":", "-.", (0, (1, 4)))


def describe(point: RadiusField) -> str:
    """Say what a certificate promises, the radius rounded down and the distance up.

    Args:
        point: a field of one point.

    Returns:
        One sentence or two.
    """
    label, radius = point.predicted.item(), point.radius.item()
    if np.isinf(radius) and point.targets == "all":
        return f"Every valid point is class {label}."
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
    model_at: Callable[..., nn.Sequential],
    xs: Sequence[float],
    ys: Sequence[float],
    data: tuple[Tensor, Tensor] | None = None,
    certificates: Mapping[str, Mapping] | None = None,
) -> ipywidgets.VBox:
    """Train on the reader's settings, and certify a point anew at every move.

    Args:
        model_at: trains a classifier of points in the plane, given the name of an activation, a
            method of :class:`crcbook.Recipe`, the weight of the curvature and the attacks' radius.
        xs: the range of the first coordinate; only its ends matter.
        ys: the range of the second coordinate; only its ends matter.
        data: points ``(items, 2)`` and their classes ``(items,)``, drawn into the figure.
        certificates: by name, options of :func:`crcbook.certify`; the plane is coloured by the
            first. None for the default alone.

    Returns:
        The widget; a live notebook displays it.

    Raises:
        ValueError: as :func:`crcbook.book.explorer.radius_field`.
    """
    certificates = {"dual": {}} if certificates is None else certificates
    grid = [np.linspace(ends[0], ends[-1], _BACKGROUND_POINTS) for ends in (xs, ys)]
    late = {"continuous_update": False}  # train when the slider is let go
    settings = [
        ipywidgets.Dropdown(options=list(ACTIVATIONS), description="activation"),
        ipywidgets.Dropdown(options=["standard", "adversarial", "crt"], description="training"),
        ipywidgets.FloatLogSlider(0.002, min=-5, max=0, step=0.25, description="γ (crt)", **late),
        ipywidgets.FloatSlider(0.2, min=0.02, max=0.6, step=0.02, description="ρ", **late),
    ]
    way = ipywidgets.Dropdown(options=list(certificates), description="certificate")
    sliders = [_slider(name, ends) for name, ends in zip(("x₁", "x₂"), (xs, ys), strict=True)]
    text, picture = ipywidgets.HTML(), ipywidgets.HTML()
    trained: dict[str, Any] = {}

    def retrain(_: object = None) -> None:
        trained["model"] = model_at(*(setting.value for setting in settings))
        options = next(iter(certificates.values()))
        trained["background"] = radius_field(trained["model"], *grid, **options)
        redraw()

    def redraw(_: object = None) -> None:
        x, y = ([slider.value] for slider in sliders)
        points = radius_fields(trained["model"], x, y, certificates)
        text.value = describe(points[way.value])
        picture.value = _picture(trained["background"], points, way.value, data)

    for setting in settings:
        setting.observe(retrain, "value")
    for control in (way, *sliders):
        control.observe(redraw, "value")
    retrain()
    chooser = [way] if len(certificates) > 1 else []
    return ipywidgets.VBox([*settings, *chooser, *sliders, text, picture])


def _live(controls: Sequence[ipywidgets.Widget], draw: Callable[..., tuple]) -> ipywidgets.VBox:
    """Controls over what ``draw`` makes of their values: a sentence, a picture, or both."""

    def drawn() -> tuple[str, ...]:
        return draw(*(control.value for control in controls))

    parts = [ipywidgets.HTML(part) for part in drawn()]

    def redraw(_: object) -> None:
        for part, value in zip(parts, drawn(), strict=True):
            part.value = value

    for control in controls:
        control.observe(redraw, "value")
    return ipywidgets.VBox([*controls, *parts])


def show(widget: ipywidgets.VBox) -> None:
    """Display a live widget; on a page of the book, where nothing moves it, a still of it.

    Args:
        widget: one of this module's.
    """
    if building_the_book():
        parts = (part.value for part in widget.children if isinstance(part, ipywidgets.HTML))
        display(HTML(f'<div class="crc-figure">{"".join(parts)}</div>'))
    else:
        display(widget)


def _slider(name: str, ends: Sequence[float]) -> ipywidgets.FloatSlider:
    low, high = float(ends[0]), float(ends[-1])
    step = (high - low) / 200
    return ipywidgets.FloatSlider((low + high) / 2, min=low, max=high, step=step, description=name)


def _picture(
    background: RadiusField,
    points: Mapping[str, RadiusField],
    chosen: str,
    data: tuple[Tensor, Tensor] | None,
) -> str:
    figure, axes = plt.subplots(layout="constrained")
    draw_field(axes, background)
    if data is not None:
        draw_data(axes, data)
    axes.autoscale(False)
    axes.set(xlabel="x₁", ylabel="x₂")
    draw_ball(axes, points[chosen])
    key = []
    for (name, point), style in zip(points.items(), cycle(_RINGS)):
        line = {"linestyle": "-" if name == chosen else style, "color": plt.rcParams["text.color"]}
        draw_ring(axes, point, **line)
        radius = np.floor(point.radius.item() * 1e3) / 1e3
        key.append(plt.Line2D([], [], **line, label=f"{name} {radius:.3f}"))
    if len(points) > 1:
        figure.legend(handles=key, loc="outside lower center", ncols=2)
    plt.close(figure)
    return svg(figure, describe(points[chosen]))


def live_dual(
    model: nn.Sequential, xs: Sequence[float], ys: Sequence[float], label: int = 0, target: int = 1
) -> ipywidgets.VBox:
    """Sliders for a point of the plane and a multiplier, with the dual's value at every move.

    Args:
        model: a classifier of points in the plane.
        xs: the range of the first coordinate; only its ends matter.
        ys: the range of the second coordinate; only its ends matter.
        label: a class.
        target: another class.

    Returns:
        The widget; a live notebook displays it.
    """
    m, _ = curvature_bounds(model, label, target)
    share = ipywidgets.FloatSlider(0.5, min=0.0, max=0.98, step=0.02, description="η · |m|")
    sliders = [_slider(name, ends) for name, ends in zip(("x₁", "x₂"), (xs, ys), strict=True)]

    def draw(share: float, *x0: float) -> tuple[str, str]:
        found = dual_at(model, x0, share / max(-m.item(), 1e-12), label, target)
        return describe_dual(found), _dual_picture(model, xs, ys, x0, found, (label, target))

    return _live([share, *sliders], draw)


def describe_dual(found: DualPoint) -> str:
    """Say what a value of the dual proves, the radius rounded down.

    Args:
        found: what :func:`dual_at` returned.

    Returns:
        One sentence.
    """
    radius = np.floor(found.radius * 1e3) / 1e3
    advice = "raise η" if found.margin > 0 else "lower η"
    return (
        f"Certified radius {radius:.3f}; the margin at the minimiser is {found.margin:+.3f}, "
        + (f"so {advice} for more.")
    )


def _dual_picture(
    model: nn.Sequential,
    xs: Sequence[float],
    ys: Sequence[float],
    x0: Sequence[float],
    found: DualPoint,
    pair: tuple[int, int],
) -> str:
    grid = [np.linspace(ends[0], ends[-1], _BACKGROUND_POINTS) for ends in (xs, ys)]
    points = torch.from_numpy(np.stack(np.meshgrid(*grid), axis=-1).reshape(-1, 2))
    network = read_network(model)
    logits = network.logits(points.to(network.device)).numpy(force=True)
    margin = (logits[:, pair[0]] - logits[:, pair[1]]).reshape(len(grid[1]), -1)
    figure, axes = plt.subplots()
    ink = plt.rcParams["text.color"]
    axes.contour(*grid, margin, levels=9, colors=ink, linewidths=0.5)
    axes.contour(*grid, margin, levels=[0], colors=ink, linewidths=2.5)
    axes.add_patch(
        plt.Circle((x0[0], x0[1]), found.radius, facecolor=(0.5, 0.5, 0.5, 0.25), edgecolor=ink)
    )
    axes.plot(*zip(x0, found.point, strict=True), ":", color=PALETTE[1])
    axes.plot(*x0, "o", color=PALETTE[0])
    axes.plot(*found.point, "D", color=PALETTE[1])
    axes.set(
        aspect="equal", xlabel="x₁", ylabel="x₂", xlim=xs[:: len(xs) - 1], ylim=ys[:: len(ys) - 1]
    )
    plt.close(figure)
    return svg(figure, describe_dual(found))


def live_spectrum(
    model: nn.Sequential, ends: tuple[Tensor, Tensor], label: int, target: int
) -> ipywidgets.VBox:
    """A slider for a point between two inputs, and the spectrum of a margin's Hessian there.

    Args:
        model: a classifier, as :func:`crcbook.certify` takes it.
        ends: two inputs; the slider moves on the line through them.
        label: the class whose margin over another one is bent.
        target: the other one to begin with.

    Returns:
        The widget; a live notebook displays it.
    """
    others = [other for other in range(read_network(model).classes) if other != label]
    over = ipywidgets.Dropdown(options=others, value=target, description="over class")
    place = ipywidgets.FloatSlider(0.0, min=-0.5, max=1.5, step=0.01, description="place t")

    def draw(other: int, part: float) -> tuple[str, str]:
        found = spectrum_at(model, ends[0] + part * (ends[1] - ends[0]), label, other)
        return describe_spectrum(found), _spectrum_picture(found)

    return _live([over, place], draw)


def describe_spectrum(found: Spectrum) -> str:
    """Compare the extreme eigenvalues with their bounds.

    Args:
        found: what :func:`spectrum_at` returned.

    Returns:
        One sentence.
    """
    low, high = found.eigenvalues[[0, -1]]
    return (
        f"Eigenvalues from {low:.3f} to {high:.3f}; nowhere below {found.lowest:.3f} "
        f"or above {found.highest:.3f}."
    )


def _spectrum_picture(found: Spectrum) -> str:
    figure, axes = plt.subplots()
    ink = plt.rcParams["text.color"]
    for bound in (found.lowest, found.highest):
        axes.axhline(bound, color=ink, linestyle="--")
    axes.plot(range(1, len(found.eigenvalues) + 1), found.eigenvalues, "o", color=PALETTE[0])
    axes.set(xlabel="eigenvalue number", ylabel="eigenvalue of the Hessian")
    plt.close(figure)
    return svg(figure, describe_spectrum(found))


def live_guess() -> ipywidgets.VBox:
    """Sliders for the dual variable and the solver's steps, and the two radii they give.

    Returns:
        The widget; a live notebook displays it.
    """
    eta = ipywidgets.FloatSlider(0.54, min=0.02, max=0.98, step=0.02, description="η")
    steps = ipywidgets.IntSlider(0, min=0, max=30, description="steps")

    def draw(eta: float, steps: int) -> tuple[str]:
        guess = radii_of_a_guess(eta, steps)
        boundary = np.log(np.e**2 - 1) / 2
        verdict = "broken" if guess.claimed > boundary else "not broken"
        return (
            f"Claimed radius {guess.claimed:.4f}: {verdict} (the boundary is at {boundary:.4f}). "
            f"Proved radius {np.floor(guess.proved * 1e4) / 1e4:.4f}.",
        )

    return _live([eta, steps], draw)


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

    def draw(*point: float) -> tuple[str, str]:
        regions = certified_regions(model, point[0], point[1], box)
        radii = (f"{name} {np.floor(r * 1e3) / 1e3:.3f}" for name, (_, r) in regions.items())
        text = "Certified radii: " + ", ".join(radii) + "."
        figure, axes = plt.subplots()
        draw_field(axes, background)
        axes.add_patch(plt.Rectangle((lower[0], lower[1]), *(upper - lower), fill=False, ls=":"))
        axes.autoscale(False)
        for name, (outline, _) in regions.items():
            axes.plot(*outline.T, "--" if "box" in name else "-", label=name)
        axes.plot(*point, "o", color=plt.rcParams["text.color"])
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        plt.close(figure)
        return text, svg(figure, text)

    return _live(sliders, draw)


def attack_at(model: nn.Sequential, x: Tensor, label: int, radius: float) -> tuple[Tensor, str]:
    """Attack one input in a ball, and say what comes of it: what the sliders call.

    Args:
        model: the classifier.
        x: one input, of any shape.
        label: its label.
        radius: the ball's l2 radius.

    Returns:
        The attack's point, in the input's shape, and a sentence.

    Raises:
        ValueError: as :func:`crcbook.certify`.
    """
    one, labels = x[None], torch.tensor([label])
    found = attack(model, one, labels, radius=radius)
    certificate = certify(model, one, labels, method="dual")
    point = found.point[0].reshape(x.shape)
    answer = read_network(model).logits(point.reshape(1, -1).double()).argmax().item()
    proved = certificate.radius.item()
    if proved == 0 and certificate.exact.item():
        return x.to(point), f"Label {label}, but classified as {certificate.target.item()} already."
    promise = f"The certified radius is {np.floor(proved * 1e3) / 1e3:.3f}"
    if found.success.item():
        return point, f"At most {radius:.2f} away lies an image classified as {answer}. {promise}."
    if proved > radius:
        return point, f"{promise}: no attack within {radius:.2f} ever succeeds."
    return point, f"The attack within {radius:.2f} failed, which proves nothing. {promise} only."


def live_attack(model: nn.Sequential, x: Tensor, y: Tensor, widest: float = 1.0) -> ipywidgets.VBox:
    """Choose an image and a radius, attack it, and compare with its certificate.

    Args:
        model: the classifier.
        x: ``(batch, height, width)`` images with pixels in [0, 1].
        y: ``(batch,)`` labels.
        widest: the largest radius to choose.

    Returns:
        The widget; a live notebook displays it.

    Raises:
        ValueError: as :func:`crcbook.certify`.
    """

    def draw(item: int, radius: float) -> tuple[str, str]:
        point, text = attack_at(model, x[item], int(y[item]), radius)
        return text, _images_picture({"image": x[item], "attacked": point}, text)

    return _image_and_radius(len(x), widest, draw)


def _image_and_radius(
    items: int, widest: float, draw: Callable[[int, float], tuple]
) -> ipywidgets.VBox:
    """Sliders for an image and a radius over what ``draw`` makes of them."""
    item = ipywidgets.IntSlider(0, min=0, max=items - 1, description="image")
    radius = ipywidgets.FloatSlider(widest / 2, min=widest / 50, max=widest, description="ρ")
    radius.step = widest / 50
    return _live([item, radius], draw)


def _images_picture(images: Mapping[str, Tensor], alt: str) -> str:
    figure, axes = plt.subplots(1, len(images), figsize=(2.3 * len(images), 2.4))
    for ax, (title, image) in zip(axes, images.items(), strict=True):
        ax.imshow(image.numpy(force=True), cmap="gray_r", vmin=0, vmax=1)
        ax.set(title=title, xticks=[], yticks=[])
    plt.close(figure)
    return svg(figure, alt)


def describe_item(certificate: Certificate, x: Tensor, label: int) -> str:
    """Say what a certificate promises for its first input, rounded to the safe side.

    Args:
        certificate: the certificate.
        x: ``(batch, *input_shape)`` the inputs it is for.
        label: the first one's label.

    Returns:
        One sentence or two.
    """
    radius, target = certificate.radius[0].item(), certificate.target[0].item()
    if radius == 0 and certificate.exact[0]:
        return f"Label {label}, classified as {target}: there is nothing to certify."
    if np.isinf(radius):
        return f"Every valid input is classified as {label}."
    promise = f"Label {label}, certified radius {np.floor(radius * 1e3) / 1e3:.3f} (l2)"
    promise += f", limited by class {target} (bound: {certificate.method[0]})."
    if certificate.exact[0]:
        return f"{promise} It is exact."
    away = certificate.distance[0].item()
    if np.isinf(away):
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

    def draw(item: int, bound: str, boxed: bool) -> tuple[str, str]:
        one, label = x[item : item + 1], y[item : item + 1]
        curvature = {"curvature": bound, "method": "dual"}
        options: dict[str, Any] = {"method": "best"} if bound == "best" else curvature
        certificate = certify(model, one, label, box=(0.0, 1.0) if boxed else None, **options)
        text = describe_item(certificate, one, int(label))
        near = certificate.nearest[0].reshape(one[0].shape)
        return text, _images_picture({"image": one[0], "nearest": near}, text)

    return _live([item, choice, box], draw)


def live_rivals(
    models: Mapping[str, nn.Sequential], x: Tensor, y: Tensor, radii: Sequence[float]
) -> ipywidgets.VBox:
    """Choose a network and an image, and see what each method proves of its margin.

    Args:
        models: classifiers by name.
        x: ``(batch, ...)`` inputs.
        y: ``(batch,)`` labels.
        radii: the balls' radii, positive.

    Returns:
        The widget; a live notebook displays it.
    """
    choice = ipywidgets.Dropdown(options=list(models), description="network")
    item = ipywidgets.IntSlider(0, min=0, max=len(x) - 1, description="image")

    def draw(name: str, item: int) -> tuple[str, str]:
        label = int(y[item])
        margins = margins_in_balls(models[name], x[item], label, radii)
        largest = radii_where_positive(margins, radii)
        proved = [f"{name} {r:.2f}" for name, r in largest.items() if name != "a point inside"]
        text = f"Label {label}. Positive up to: {', '.join(proved)}."
        figure, axes = plt.subplots()
        for name, values in margins.items():
            axes.plot(radii, values, ":" if name == "a point inside" else "-", label=name)
        axes.axhline(0, color="gray", lw=1)
        top = max(margins["a point inside"].max(), 1.0)
        axes.set(xlabel="radius ρ (l2)", ylabel="worst margin (logits)", ylim=(-top, 1.1 * top))
        axes.legend()
        plt.close(figure)
        return text, svg(figure, text)

    return _live([choice, item], draw)


def live_ball(model: nn.Sequential, x: Tensor, y: Tensor, widest: float = 1.0) -> ipywidgets.VBox:
    """Choose an image and a radius, and see what is proved of its smallest margin in the ball.

    Args:
        model: the classifier, with a hidden layer.
        x: ``(batch, *input_shape)`` images.
        y: ``(batch,)`` labels.
        widest: the largest radius to choose.

    Returns:
        The widget; a live notebook displays it.

    Raises:
        ValueError: as :func:`crcbook.certify`.
    """

    def draw(item: int, radius: float) -> tuple[str, str]:
        image, label = x[item], int(y[item])
        logits = model(image[None].to(next(model.parameters())))[0].detach()
        logits[label] = -torch.inf
        target = int(logits.argmax())
        margins = local_margins(model, image, label, target, radius)
        sign = "stays positive" if margins["followed outward"] > 0 else "is not proved positive"
        text = f"Class {label} over class {target}: the margin {sign} in the ball."
        figure, axes = plt.subplots(figsize=(5.4, 2.4))
        bars = axes.barh(list(margins), list(margins.values()), color=list(PALETTE[: len(margins)]))
        axes.bar_label(bars, fmt="%.2f", padding=4)
        axes.axvline(0, color=plt.rcParams["text.color"], lw=1)
        axes.margins(x=0.2)
        axes.set_xlabel("margin in the ball")
        plt.close(figure)
        return text, svg(figure, text)

    return _image_and_radius(len(x), widest, draw)


def describe_training(model: nn.Sequential, data: Split) -> str:
    """Say what a network knows of its data and what can be proved of it.

    Args:
        model: a classifier.
        data: points and their classes.

    Returns:
        One sentence.
    """
    radius = certify(model, data.x.double(), data.y).radius
    correct = radius > 0
    mean = radius[correct].mean().item() if correct.any() else 0.0
    accuracy = correct.double().mean().item()
    return f"Accuracy {accuracy:.0%}; mean certified radius {mean:.2f} where correct."


def live_training(
    data: Split, xs: Sequence[float], ys: Sequence[float], epochs: int = 40
) -> ipywidgets.VBox:
    """Sliders for the weight of the curvature and the attacks' radius; each move trains anew.

    Args:
        data: points of the plane and their classes.
        xs: the range of the first coordinate; only its ends matter.
        ys: the range of the second coordinate; only its ends matter.
        epochs: passes over the data.

    Returns:
        The widget; a live notebook displays it.
    """
    grid = [np.linspace(ends[0], ends[-1], _BACKGROUND_POINTS) for ends in (xs, ys)]
    late = {"continuous_update": False}  # train when the slider is let go
    gamma = ipywidgets.FloatLogSlider(
        0.002, base=10, min=-5, max=0, step=0.25, description="γ", **late
    )
    radius = ipywidgets.FloatSlider(0.2, min=0.02, max=0.6, step=0.02, description="ρ", **late)

    def draw(gamma: float, radius: float) -> tuple[str, str]:
        model = trained_at(data, gamma, radius, epochs)
        text = describe_training(model, data)
        figure, axes = plt.subplots()
        draw_field(axes, radius_field(model, *grid))
        draw_data(axes, (data.x, data.y))
        plt.close(figure)
        return text, svg(figure, text)

    return _live([gamma, radius], draw)
