"""Certified radii on a grid of the plane, and the figure that lets a reader walk through them."""

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any, cast

import contourpy
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML
from matplotlib.axes import Axes
from torch import Tensor, nn

from crcbook.attacks import attack
from crcbook.book.plots import PALETTE
from crcbook.certificate import Certificate, certify
from crcbook.networks import Network, read_network

_BOUNDARY_POINTS = 161  # a side of the grid that a boundary is drawn from
_RESTARTS = 4  # of the attack that looks for a nearest point


@dataclass(frozen=True)
class RadiusField:
    """The certificate at every point of a grid; the label is the class predicted there.

    Attributes:
        xs: ``(columns,)`` float64, increasing.
        ys: ``(rows,)`` float64, increasing.
        predicted: ``(rows, columns)`` int64.
        radius: ``(rows, columns)`` float64 certified l2 radii, infinity where no adversary exists.
        target: ``(rows, columns)`` int64, the class whose boundary limits the radius.
        exact: ``(rows, columns)`` bool: the radius is the distance to the boundary.
        nearest: ``(rows, columns, 2)`` the closest adversarial point that the certificate or an
            attack found, NaN where none was.
        boundary: the decision boundary as polylines ``(points, 2)``; a drawing, not a proof.
        classes: the number of classes.
        targets: ``"all"``, or ``"runner-up"`` where the radius holds against that class only.
    """

    xs: np.ndarray
    ys: np.ndarray
    predicted: np.ndarray
    radius: np.ndarray
    target: np.ndarray
    exact: np.ndarray
    nearest: np.ndarray
    boundary: tuple[np.ndarray, ...]
    classes: int
    targets: str

    @property
    def distance(self) -> np.ndarray:
        """``(rows, columns)`` l2 distance to ``nearest``; NaN where there is none."""
        points = np.stack(np.meshgrid(self.xs, self.ys), axis=-1)
        return np.linalg.norm(self.nearest - points, axis=-1)


def radius_field(
    model: nn.Sequential,
    xs: Sequence[float] | np.ndarray,
    ys: Sequence[float] | np.ndarray,
    **options: Any,
) -> RadiusField:
    """Certify the class predicted at every point of a grid.

    Args:
        model: a classifier of points in the plane, as :func:`crcbook.certify` takes it.
        xs: ``(columns,)`` increasing, finite coordinates.
        ys: ``(rows,)`` increasing, finite coordinates.
        **options: passed on to :func:`crcbook.certify`.

    Returns:
        The field.

    Raises:
        ValueError: where the coordinates are not increasing and finite, or where the model does
            not take two inputs.
    """
    box = options.pop("box", None)
    return radius_fields(model, xs, ys, {"": options}, box)[""]


def radius_fields(
    model: nn.Sequential,
    xs: Sequence[float] | np.ndarray,
    ys: Sequence[float] | np.ndarray,
    certificates: Mapping[str, Mapping],
    box: tuple | None = None,
) -> dict[str, RadiusField]:
    """Certify the class predicted at every point of a grid in several ways.

    Args:
        model: a classifier of points in the plane, as :func:`crcbook.certify` takes it.
        xs: ``(columns,)`` increasing, finite coordinates.
        ys: ``(rows,)`` increasing, finite coordinates.
        certificates: by name, options of :func:`crcbook.certify` other than the box; the method is
            ``"dual"`` where none is named.
        box: the valid points, as in :func:`crcbook.certify`.

    Returns:
        A field a name. They share their nearest points, the closest that any of them found.

    Raises:
        ValueError: as :func:`radius_field`.
    """
    xs, ys = _coordinates("xs", xs), _coordinates("ys", ys)
    network = read_network(model)
    if network.inputs != 2:
        raise ValueError(f"model must take points in the plane; it takes {network.inputs} inputs")
    points = _grid(xs, ys)
    predicted = network.logits(points.to(network.device)).argmax(1)
    found = {
        name: certify(model, points, predicted, box=box, **{"method": "dual", **options})
        for name, options in certificates.items()
    }
    nearest = _nearest(model, points, predicted, list(found.values()), box)
    nearest, boundary = nearest.reshape(len(ys), len(xs), 2), _boundary(network, xs, ys)
    fields = {}
    for name, certificate in found.items():
        columns = (predicted, certificate.radius, certificate.target, certificate.exact)
        label, radius, target, exact = (
            column.cpu().numpy().reshape(len(ys), len(xs)) for column in columns
        )
        fields[name] = RadiusField(
            xs, ys, label, radius, target, exact, nearest, boundary, network.classes,
            certificate.targets,
        )  # fmt: skip
    return fields


def explorer(
    fields: RadiusField | Mapping[str | tuple[str, ...], RadiusField],
    data: tuple[Tensor, Tensor] | None = None,
    start: tuple[float, float] | Mapping[str, tuple] = (0.0, 0.0),
    classes: Sequence[str] | None = None,
    choices: Sequence[str] = ("network",),
    alt: str = "Decision regions; the colour is stronger where the certified radius is larger.",
) -> HTML:
    """A figure in which sliders and pointer move a point, and its certified ball follows.

    Everything shown was computed by :func:`radius_field`; the figure's JavaScript only looks it
    up. The point snaps to the grid, radii are rounded down and distances up, so that every number
    shown is proved. It needs neither a kernel nor a network.

    Args:
        fields: one field, or several to choose among: a name each, or a tuple of names, one a
            choice, in every combination; all on the same evenly spaced grid. Beside the one chosen
            the balls of those are drawn that differ from it in the last choice only.
        data: points ``(items, 2)`` and their classes ``(items,)``, drawn into the figure.
        start: the point shown first; the nearest grid point is taken. Or several points, by what a
            button that leads there says, each with the names of a field: ``(x, y, *names)``.
        classes: what to call the classes; ``class 0``, ``class 1``, ... where missing.
        choices: what to call the choices among several fields.
        alt: what the picture shows, for readers who do not see it.

    Returns:
        Self-contained HTML, up to 20 bytes per grid point and field; what fields share is there
        once.

    Raises:
        ValueError: for no field, different grids, an uneven grid, a wrong number of names, or a
            view of a field that is not there.
    """
    fields = {"": fields} if isinstance(fields, RadiusField) else fields
    named = {(key,) if isinstance(key, str) else key: field for key, field in fields.items()}
    _check_fields(named)
    _check_choices(named, choices)
    views = start if isinstance(start, Mapping) else {"": (*start, *next(iter(named)))}
    payload = _payload(named, data, classes)
    payload["views"] = [_view(named, *view) for view in views.values()]
    buttons = (f'<button type="button">{html.escape(name)}</button>' for name in views if name)
    selects = (f"<label>{html.escape(name)} <select></select></label>" for name in choices)
    template = Template(files("crcbook.book").joinpath("explorer.html").read_text("utf-8"))
    return HTML(
        template.substitute(
            alt=html.escape(alt),
            choices="".join(selects),
            views="".join(buttons),
            # No text inside may close the script element.
            data=json.dumps(payload, separators=(",", ":"), allow_nan=False).replace(
                "<", "\\u003c"
            ),
            script=files("crcbook.book").joinpath("explorer.js").read_text("utf-8"),
        )
    )


def draw_field(axes: Axes, field: RadiusField) -> None:
    """Draw decision regions, coloured more strongly where the certified radius is larger.

    Args:
        axes: matplotlib axes; they get equal scales.
        field: at least two points in each direction, evenly spaced.
    """
    colours = np.array([_rgb(colour) for colour in PALETTE]) / 255
    strength = field.radius / _largest([field])
    opacity = 0.06 + 0.84 * np.sqrt(np.minimum(strength, 1.0))
    step_x, step_y = field.xs[1] - field.xs[0], field.ys[1] - field.ys[0]
    extent = (
        *(field.xs[[0, -1]] + (-step_x / 2, step_x / 2)),
        *(field.ys[[0, -1]] + (-step_y / 2, step_y / 2)),
    )
    image = np.concatenate([colours[field.predicted], opacity[..., None]], axis=-1)
    axes.imshow(image, origin="lower", extent=extent, interpolation="bilinear")
    for line in field.boundary:
        axes.plot(*line.T, color=plt.rcParams["text.color"])


def draw_ball(axes: Axes, field: RadiusField, row: int = 0, column: int = 0) -> None:
    """Draw one point of a field, its certified ball and its nearest adversarial point.

    Args:
        axes: matplotlib axes.
        field: the field.
        row: the point's index in ``field.ys``.
        column: the point's index in ``field.xs``.
    """
    ink = plt.rcParams["text.color"]
    centre = (field.xs[column], field.ys[row])
    draw_ring(axes, field, row, column)
    draw_ring(axes, field, row, column, fill=True, color=(0.5, 0.5, 0.5, 0.25))
    axes.plot(*zip(centre, field.nearest[row, column], strict=True), "--", color=ink, lw=1.5)
    axes.plot(*field.nearest[row, column], "x", color=ink, markersize=9, markeredgewidth=2.5)
    axes.plot(*centre, "o", color=ink)


def draw_ring(axes: Axes, field: RadiusField, row: int = 0, column: int = 0, **style: Any) -> None:
    """Draw the certified ball of one point of a field.

    Args:
        axes: matplotlib axes.
        field: the field.
        row: the point's index in ``field.ys``.
        column: the point's index in ``field.xs``.
        **style: properties of the circle.
    """
    # An infinite ball is drawn as one that covers the axes.
    radius = min(field.radius[row, column], np.ptp(axes.axis()))
    centre = (field.xs[column], field.ys[row])
    style = {"fill": False, "color": plt.rcParams["text.color"], "lw": 2} | style
    axes.add_patch(plt.Circle(centre, radius, **style))


def draw_data(axes: Axes, data: tuple[Tensor, Tensor]) -> None:
    """Draw labelled points, each class in its colour and shape.

    Args:
        axes: matplotlib axes.
        data: points ``(items, 2)`` and their classes ``(items,)``.
    """
    points, labels = (np.asarray(part) for part in data)
    for label in np.unique(labels):
        x, y = points[labels == label].T
        axes.scatter(
            x,
            y,
            s=14,
            marker="os^D"[label % 4],
            color=PALETTE[label],
            edgecolors=plt.rcParams["text.color"],
            linewidths=0.7,
        )


def _coordinates(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite numbers in one dimension; got {values}")
    if not (np.diff(values) > 0).all():
        raise ValueError(f"{name} must increase; got {values}")
    return values


def _grid(xs: np.ndarray, ys: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2))


def _nearest(
    model: nn.Sequential,
    points: Tensor,
    predicted: Tensor,
    certificates: list[Certificate],
    box: tuple | None,
) -> np.ndarray:
    """The closest of the adversarial points that the certificates and an attack found."""
    found = [certificate.nearest for certificate in certificates]
    points = points.to(found[0])
    settled = [c.exact | c.radius.isinf() for c in certificates]
    rows = (~torch.stack(settled).any(0)).nonzero().squeeze(1)
    if len(rows):
        attacked = torch.full_like(points, torch.nan)
        attacked[rows] = attack(
            model, points[rows], predicted[rows], box=box, restarts=_RESTARTS
        ).point
        found.append(attacked)
    every = torch.stack(found)
    distance = (every - points).norm(dim=2).nan_to_num(nan=torch.inf)
    return every[distance.argmin(0), torch.arange(len(points))].cpu().numpy()


def _boundary(network: Network, xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where a class and the best of the others tie, from a finer grid than the radii's."""
    if len(xs) < 2 or len(ys) < 2:
        return ()
    fine_xs = np.linspace(xs[0], xs[-1], _BOUNDARY_POINTS)
    fine_ys = np.linspace(ys[0], ys[-1], _BOUNDARY_POINTS)
    logits = network.logits(_grid(fine_xs, fine_ys).to(network.device)).cpu()
    lines: list[np.ndarray] = []
    # Two classes share their one boundary; with more, two classes draw each piece, which hides
    # nothing.
    for label in range(1 if network.classes == 2 else network.classes):
        others = logits.clone()
        others[:, label] = -torch.inf
        margin = (logits[:, label] - others.max(1).values).reshape(len(fine_ys), -1)
        generator = contourpy.contour_generator(fine_xs, fine_ys, margin.numpy())
        lines += _lines(generator, 0.0)
    return tuple(lines)


def _check_fields(fields: Mapping[tuple[str, ...], RadiusField]) -> None:
    if not fields:
        raise ValueError("fields must hold at least one field; got none")
    first = next(iter(fields.values()))
    for field in fields.values():
        if not (np.array_equal(field.xs, first.xs) and np.array_equal(field.ys, first.ys)):
            raise ValueError("fields must all have the same grid")
        if field.classes != first.classes:
            raise ValueError("fields must all have the same number of classes")
    for name, values in (("xs", first.xs), ("ys", first.ys)):
        steps = np.diff(values)
        if len(steps) < 1 or not np.allclose(steps, steps[0], rtol=1e-6, atol=0):
            raise ValueError(f"the explorer needs at least two evenly spaced {name}")
    if first.classes > len(PALETTE):
        raise ValueError(f"the explorer has colours for {len(PALETTE)} classes, not more")


def _check_choices(fields: Mapping[tuple[str, ...], RadiusField], choices: Sequence[str]) -> None:
    if any(len(key) != len(choices) for key in fields):
        raise ValueError(f"fields must have {len(choices)} names each, one a choice")
    combinations = math.prod(len(set(options)) for options in zip(*fields, strict=True))
    if combinations != len(fields):
        raise ValueError(f"fields must hold all {combinations} combinations; got {len(fields)}")


def _view(fields: Mapping[tuple[str, ...], RadiusField], x: float, y: float, *key: str) -> dict:
    """A field's names, and the column and the row of the grid point nearest to a place."""
    if key not in fields:
        raise ValueError(f"a start must name one of the fields; got {key}")
    field = fields[key]
    return {"key": key, "place": [int(abs(field.xs - x).argmin()), int(abs(field.ys - y).argmin())]}


def _payload(
    fields: Mapping[tuple[str, ...], RadiusField],
    data: tuple[Tensor, Tensor] | None,
    classes: Sequence[str] | None,
) -> dict:
    first = next(iter(fields.values()))
    classes = list(classes or (f"class {label}" for label in range(first.classes)))
    if len(classes) != first.classes:
        raise ValueError(f"classes must name {first.classes} classes; got {len(classes)}")
    points, labels = ([], []) if data is None else data
    largest = _largest(fields.values())
    pool: dict[str, int] = {}  # each array once, whatever number of fields it belongs to
    shown = [_field_payload(field, largest, pool) | {"key": key} for key, field in fields.items()]
    return {
        "xs": first.xs.tolist(),
        "ys": first.ys.tolist(),
        "classes": classes,
        "colours": [_rgb(colour) for colour in PALETTE[: first.classes]],
        "largest": largest,
        "points": np.asarray(points, dtype=np.float64).round(3).tolist(),
        "labels": np.asarray(labels, dtype=np.int64).tolist(),
        "arrays": list(pool),
        "fields": shown,
    }


def _field_payload(field: RadiusField, largest: float, pool: dict[str, int]) -> dict:
    def pooled(values: np.ndarray | str) -> int:
        text = values if isinstance(values, str) else _base64(values)
        return pool.setdefault(text, len(pool))

    return {
        "all": field.targets == "all",
        "radius": pooled(_towards(field.radius, 0.0)),
        "distance": pooled(_towards(field.distance, np.inf)),
        "nearest": pooled(field.nearest.astype("<f4")),
        "predicted": pooled(field.predicted.astype(np.uint8)),
        "exact": pooled(field.exact.astype(np.uint8)),
        "boundary": pooled(json.dumps([line.round(3).tolist() for line in field.boundary])),
        "contours": [line.round(2).tolist() for line in _contours(field, largest)],
    }


def _largest(fields: Iterable[RadiusField]) -> float:
    """The largest finite radius, or 1 where none is positive: the full strength of a colour."""
    radii = np.concatenate([field.radius[np.isfinite(field.radius)] for field in fields])
    return float(radii.max(initial=0.0)) or 1.0


def _towards(values: np.ndarray, limit: float) -> np.ndarray:
    """Round to float32 in the direction of ``limit``: 0 for a promise, infinity for an attack."""
    rounded = values.astype("<f4")
    wrong = rounded > values if limit == 0.0 else rounded < values
    return np.where(wrong, np.nextafter(rounded, np.float32(limit)), rounded).astype("<f4")


def _contours(field: RadiusField, largest: float) -> list[np.ndarray]:
    """Lines of equal radius, five levels up to the largest; they guide the eye only."""
    finite = np.where(np.isfinite(field.radius), field.radius, largest)
    generator = contourpy.contour_generator(field.xs, field.ys, finite)
    return [line for level in np.arange(1, 6) * largest / 6 for line in _lines(generator, level)]


def _lines(generator: contourpy.ContourGenerator, level: float) -> list[np.ndarray]:
    """The lines of a level; of other kinds than the default one they would be a tuple."""
    return cast("list[np.ndarray]", generator.lines(level))


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _rgb(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
