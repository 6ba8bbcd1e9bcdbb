"""Certifying and attacking a test split, and the figures that come of it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from crcbook.attacks import attack, smallest_margin
from crcbook.certificate import certify, verify, verify_by_kind
from crcbook.checks import as_box, as_classes, as_inputs
from crcbook.datasets import Split
from crcbook.networks import Network, read_network
from crcbook.training.losses import runner_up

ATTACK: dict = {"steps": 20, "restarts": 1}  # what an image must survive


def evaluate(
    model: nn.Module,
    test: Split,
    radius: float,
    box: bool = False,
    local: bool = False,
    rival: str | None = None,
) -> dict[str, Tensor]:
    """Certify and attack each item of a test split.

    Args:
        model: the classifier.
        test: the items.
        radius: the l2 radius of the attacks and of the local certificates.
        box: also with an adversary confined to pixels in [0, 1].
        local: also with the curvature of the balls of that radius, where the curvature over all of
            R^n decides nothing.
        rival: a bound that is not curvature's, ``"crown"`` or ``"lipschitz"``, which certifies too:
            for networks that were trained for it.

    Returns:
        Columns of one entry an item: ``correct``, ``exact``, ``radius`` (by global curvature),
        ``certified`` (at the radius, by any of the certificates), ``certified_runner_up`` (against
        that class alone), ``survived`` (the attack), with a box ``certified_box`` and
        ``survived_box``, and with a rival ``certified_rival`` (by its bound).

    Raises:
        ValueError: where the box does not hold the items.
    """
    network, unit = read_network(model, test.x), (0.0, 1.0) if box else None
    x, y = as_inputs(test.x, network), as_classes("y", test.y, network, len(test))
    as_box(unit, x)
    certificate = certify(model, x, y, method="dual")
    correct = smallest_margin(network, x, y) > 0
    columns = {"correct": correct, "exact": certificate.exact, "radius": certificate.radius}
    certified = certificate.radius >= radius
    attacked = partial(attack, model, radius=radius, **ATTACK)
    found = attacked(x=x, y=y)
    columns["survived"], points = ~found.success, found.point
    # What an attack broke needs no certificate.
    if rival:
        proved = partial(verify, model, radius=radius, method=rival)
        columns["certified_rival"] = _asked(columns["survived"], proved, x, y)
        certified = certified | columns["certified_rival"]
    if box:
        columns["survived_box"] = _survivors(~certified, partial(attacked, box=unit), x, y)
    if local:
        rows = ~certified & (columns["survived_box"] if box else columns["survived"])
        proved = partial(verify_by_kind, model, radius=radius, box=unit)
        kinds = _kinds(rows, proved, x, y)
        certified = certified | kinds["local"]
        columns["certified_box"] = certified | kinds.get("local in box", certified)
    columns["certified"] = certified
    rows = ~certified & correct & ~_in_runner_up(network, x, y, points)
    proved = partial(
        verify, model, radius=radius, targets="runner-up", method="dual",
        curvature="local" if local else "global",
    )  # fmt: skip
    columns["certified_runner_up"] = certified | _asked(rows, proved, x, y)
    if box and not local:
        proved = partial(verify, model, radius=radius, box=unit, method="dual")
        rows = ~certified & columns["survived_box"]
        columns["certified_box"] = certified | _asked(rows, proved, x, y)
    if not box:
        columns.pop("certified_box", None)
    return {name: column.cpu() for name, column in columns.items()}


def _asked(rows: Tensor, proved: Callable, x: Tensor, y: Tensor) -> Tensor:
    """The verdicts on some of the items; False for the others."""
    found = torch.zeros_like(rows)
    if rows.any():
        found[rows] = proved(x=x[rows], y=y[rows]).robust
    return found


def _survivors(rows: Tensor, attacked: Callable, x: Tensor, y: Tensor) -> Tensor:
    """Which items an attack leaves; those not in ``rows`` need not be attacked."""
    survived = torch.ones_like(rows)
    if rows.any():
        survived[rows] = ~attacked(x=x[rows], y=y[rows]).success
    return survived


def _kinds(rows: Tensor, proved: Callable, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What each kind of certificate proves of some items; False for the others."""
    nothing = torch.zeros_like(rows)
    if not rows.any():
        return {"local": nothing, "local in box": nothing}
    kinds = proved(x=x[rows], y=y[rows])
    return {name: nothing.masked_scatter(rows, column) for name, column in kinds.items()}


def _in_runner_up(network: Network, x: Tensor, y: Tensor, points: Tensor) -> Tensor:
    """Whether points have crossed into the runner-up class of their inputs."""
    target = runner_up(network.logits, x, y)
    margin, _ = network.margin_and_units(points, y, target)
    return margin <= 0


def crown_radii(model: nn.Module, test: Split, images: int) -> Tensor:
    """The first images' radii by CROWN, NaN for the others."""
    radius = torch.full((len(test),), torch.nan, dtype=torch.float64)
    if images:
        x, y = test.x[:images], test.y[:images]
        radius[:images] = certify(model, x, y, method="crown").radius.cpu()
    return radius


def summary(columns: dict[str, Tensor], radius: float) -> dict:
    """The figures of an evaluation.

    Args:
        columns: what :func:`evaluate` returned.
        radius: the radius it was asked for.

    Returns:
        Accuracies as fractions of all items, over the correctly classified ``mean_radius`` (None
        where it is infinite or there are none) and ``exact_fraction``, ``violations``
        (attacks inside a certified ball: 0; :func:`evaluate` asks for other certificates than
        global curvature's only where its attack failed). The box's are None where there was none.
        Where the columns hold CROWN's radii, their mean, and that of ours for the same images,
        ``mean_radius_crown_images``.
    """
    correct, certified = columns["correct"], columns["certified"]
    mean = columns["radius"][correct].mean().item()
    figures = {
        "images": len(correct),
        "clean_accuracy": _fraction(correct),
        "certified_accuracy": _fraction(certified),
        "certified_accuracy_global": _fraction(columns["radius"] >= radius),
        "certified_accuracy_runner_up": _fraction(certified | columns["certified_runner_up"]),
        "empirical_accuracy": _fraction(columns["survived"]),
        "violations": int((certified & ~columns["survived"]).sum()),
        "mean_radius": mean if 0 <= mean < float("inf") else None,
        "exact_fraction": columns["exact"][correct].double().mean().nan_to_num().item(),
        "certified_accuracy_box": None,
        "empirical_accuracy_box": None,
        "violations_box": None,
    }
    if "certified_box" in columns:
        certified, survived = columns["certified_box"], columns["survived_box"]
        figures |= {
            "certified_accuracy_box": _fraction(certified),
            "empirical_accuracy_box": _fraction(survived),
            "violations_box": int((certified & ~survived).sum()),
        }
    if "certified_rival" in columns:
        figures["certified_accuracy_rival"] = _fraction(columns["certified_rival"])
    if "radius_crown" in columns:
        both = correct & ~columns["radius_crown"].isnan()
        figures["mean_radius_crown"] = columns["radius_crown"][both].mean().item()
        figures["mean_radius_crown_images"] = columns["radius"][both].mean().item()
    return figures


def _fraction(column: Tensor) -> float:
    return round(column.double().mean().item(), 6)
