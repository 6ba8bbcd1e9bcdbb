"""Certifying and attacking a test split, and the figures that come of it."""

import torch
from torch import Tensor, nn

from crcbook.attacks import attack, smallest_margin
from crcbook.certificate import certify, verify
from crcbook.checks import as_box, as_classes, as_inputs
from crcbook.datasets import Split
from crcbook.networks import Network, read_network
from crcbook.training.losses import runner_up


def evaluate(
    model: nn.Sequential,
    test: Split,
    radius: float,
    box: bool = False,
    local: bool = False,
    rival: str | None = None,
    progress: bool = False,
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
        progress: show progress bars.

    Returns:
        Columns of one entry an item: ``correct``, ``exact``, ``radius`` (by global curvature),
        ``certified`` (at the radius, by any of the certificates), ``certified_runner_up`` (against
        that class alone), ``survived`` (the attack), with a box ``certified_box`` and
        ``survived_box``, and with a rival ``certified_rival`` (by its bound).

    Raises:
        ValueError: where the box does not hold the items.
    """
    network, unit = read_network(model), (0.0, 1.0)
    x, y = as_inputs(test.x, network), as_classes("y", test.y, network, len(test))
    if box:
        as_box(unit, x)
    certificate = certify(model, x, y, progress=progress)
    correct = smallest_margin(network, x, y) > 0
    columns = {"correct": correct, "exact": certificate.exact, "radius": certificate.radius}
    curvature = "local" if local else "global"

    def verified(rows: Tensor, **options) -> Tensor:
        """Which of the items are certified, asked only of those in ``rows``."""
        found = torch.zeros_like(correct)
        if rows.any():
            verdict = verify(model, x[rows], y[rows], radius, progress=progress, **options)
            found[rows] = verdict.robust
        return found

    found = attack(model, x, y, radius=radius, progress=progress)
    columns["survived"], points = ~found.success, found.point
    certified = certificate.radius >= radius
    # What the attack broke needs no certificate.
    if rival:
        rows, found = columns["survived"], torch.zeros_like(correct)
        if rows.any():
            found[rows] = verify(model, x[rows], y[rows], radius, method=rival).robust
        columns["certified_rival"], certified = found, certified | found
    if local:
        certified = certified | verified(~certified & columns["survived"], curvature="local")
    columns["certified"] = certified
    rows = ~certified & correct & ~_in_runner_up(network, x, y, points)
    columns["certified_runner_up"] = certified | verified(
        rows, targets="runner-up", curvature=curvature
    )
    if box:
        columns["survived_box"], rows = torch.ones_like(correct), ~certified
        if rows.any():
            found = attack(model, x[rows], y[rows], radius=radius, box=unit, progress=progress)
            columns["survived_box"][rows] = ~found.success
        boxed = certified | verified(~certified & columns["survived_box"], box=unit)
        if local:
            boxed |= verified(~boxed & columns["survived_box"], box=unit, curvature="local")
        columns["certified_box"] = boxed
    return {name: column.cpu() for name, column in columns.items()}


def _in_runner_up(network: Network, x: Tensor, y: Tensor, points: Tensor) -> Tensor:
    """Whether points have crossed into the runner-up class of their inputs."""
    target = runner_up(network.logits, x, y)
    margin, _ = network.margin_and_units(points, y, target)
    return margin <= 0


def crown_radii(model: nn.Sequential, test: Split, images: int, progress: bool) -> Tensor:
    """The first images' radii by CROWN, NaN for the others."""
    radius = torch.full((len(test),), torch.nan, dtype=torch.float64)
    if images:
        x, y = test.x[:images], test.y[:images]
        radius[:images] = certify(model, x, y, method="crown", progress=progress).radius.cpu()
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
