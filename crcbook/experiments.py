"""Named, recorded experiments: every network of the book's tables comes from one of these.

``python -m crcbook reproduce`` runs what is missing. A record is a JSON file with the figures, the
radii themselves, and everything a figure depends on. Started by ``torchrun``, several processes
share the trainings, and then the test images of each network.
"""

import base64
import hashlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn
from tqdm.auto import tqdm

from crcbook.attacks import attack, smallest_margin
from crcbook.certificate import certify, verify
from crcbook.checkpoints import load_model, load_tensors, read_json, save_tensors, write_json
from crcbook.checks import as_box, as_classes, as_inputs
from crcbook.datasets import Split, load, split_validation
from crcbook.networks import Network, deepen, mlp, read_network
from crcbook.objectives import runner_up
from crcbook.rivals import rival_robust
from crcbook.training import Recipe, best_epoch, knows_bfloat16, train

PROFILES = ("quick", "full")
RADIUS_UNIT = 1e-4  # of the recorded radii
_VALIDATION_ITEMS = 5000
_ATTACK = {"steps": 20, "restarts": 1}  # what an image must survive
_PART_ITEMS = 250  # evaluated together: what an interrupted evaluation loses
_CONTROL = "mnist-2-softplus-crt-control"
# The bounds that certify best what was trained for them.
_BOUNDS = {"ibp": "crown", "crown-ibp": "crown", "lipschitz": "lipschitz"}


@dataclass(frozen=True)
class Experiment:
    """A network to train and what to certify it for.

    Attributes:
        dataset: a name that :func:`crcbook.load` knows.
        layers: linear layers; 2 is one hidden layer.
        activation: a name from the table of activations.
        recipe: how it is trained; its radius is also the one its accuracies are for.
        width: units of a hidden layer.
        seed: the seed of the initialisation; the recipe has its own.
        box: also confine an adversary to pixels in [0, 1].
        crown_images: how many test images, from the first, also get a radius by CROWN.
        start: the experiment with as many layers or fewer whose trained network, deepened by
            :func:`crcbook.networks.deepen`, this one goes on from; None for a random start.
    """

    dataset: str
    layers: int
    activation: str
    recipe: Recipe
    width: int = 1024
    seed: int = 0
    box: bool = True
    crown_images: int = 0
    start: "Experiment | None" = None


def experiments(profile: str = "full") -> dict[str, Experiment]:
    """The experiments of a profile, in the order of their worth.

    Args:
        profile: ``"full"``, the book's tables, or ``"quick"``, the same code on the digits.

    Returns:
        Experiments by name.

    Raises:
        ValueError: for an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}; got {profile!r}")
    return _full() if profile == "full" else _quick()


def _full() -> dict[str, Experiment]:
    broad = Recipe(gamma=0.03, reach=1.1, epochs=40, average=0.99, attack_dtype="bfloat16",
                   loss_q=0.3)  # fmt: skip
    fine = replace(broad, gamma=0.06, epochs=6, learning_rate=5e-4, ramp_epochs=0.0)
    boxed = replace(fine, epochs=8, learning_rate=1e-3, attack_box=True, validate_every=4)
    patient = replace(broad, epochs=120, validate_every=10)
    tuned = replace(fine, epochs=4, learning_rate=1e-3, validate_every=4)
    brief = replace(broad, gamma=0.06, epochs=12)
    first = Experiment("mnist", 2, "softplus", broad)
    two = replace(first, recipe=fine, start=first)
    found = {
        "mnist-2-softplus-crt": two,
        "mnist-2-softplus-crt-box": replace(two, recipe=boxed),
        "mnist-2-softplus-crt-long": replace(
            two, recipe=replace(tuned, gamma=0.1), start=replace(first, recipe=patient)
        ),
        "mnist-3-softplus-crt": _deeper(two, 3),
        "mnist-4-softplus-crt": _deeper(two, 4),
    }
    for layers in (2, 3, 4):
        found |= _rivals(layers)
        for dataset, activation in (
            ("mnist", "sigmoid"), ("mnist", "tanh"), ("fashion-mnist", "softplus"),
        ):  # fmt: skip
            experiment = _deeper(Experiment(dataset, 2, activation, brief), layers)
            found[f"{dataset}-{layers}-{activation}-crt"] = experiment
        for gamma in (0.003, 0.01, 0.03, 0.1, 0.3) if layers == 2 else ():
            recipe = replace(tuned, gamma=gamma)
            found[f"mnist-2-softplus-crt-gamma-{gamma:g}"] = replace(two, recipe=recipe, box=False)
        found |= _small_radius(layers)
    return found | _controls(two)


def _controls(headline: Experiment) -> dict[str, Experiment]:
    """The headline recipe with both of its stages at one gamma: what does the curvature add?

    In short, 10 and 2 epochs with no choice among them and attacks in float32, so that several
    seeds can be afforded; and as long as the headline, without the curvature.
    """
    seeds = {0.0: 3, 0.03: 3, 0.1: 3, 0.01: 1, 0.3: 1, 0.003: 1}
    found = {
        f"{_CONTROL}-gamma-{gamma:g}{f'-seed-{seed}' if seed else ''}": _at_gamma(
            _shortened(headline, 10, 2), gamma, seed
        )
        for gamma, count in seeds.items()
        for seed in range(count)
    }
    return found | {f"{_CONTROL}-whole-gamma-0": _at_gamma(headline, 0.0, 0)}


def _shortened(experiment: Experiment, *epochs: int) -> Experiment:
    """A training in stages with other numbers of epochs, the last of which alone is validated.

    Its attacks are in float32: bfloat16 takes longer where a processor has to imitate it.
    """
    *before, own = epochs
    recipe = replace(experiment.recipe, epochs=own, validate_every=own, attack_dtype="float32")
    start = experiment.start and _shortened(experiment.start, *before)
    return replace(experiment, recipe=recipe, start=start)


def _at_gamma(experiment: Experiment, gamma: float, seed: int) -> Experiment:
    """A training with all of its stages at one gamma, drawn anew from another seed."""
    recipe = replace(experiment.recipe, gamma=gamma, seed=seed)
    start = experiment.start and _at_gamma(experiment.start, gamma, seed)
    return replace(experiment, recipe=recipe, seed=seed, start=start, box=False)


def _deeper(experiment: Experiment, layers: int) -> Experiment:
    """An experiment that goes on from the trained network of a shallower one."""
    if layers == experiment.layers:
        return experiment
    # The copied layers work far from 0, where Adam's steps add up: small ones only.
    recipe = replace(experiment.recipe, epochs=2, learning_rate=5e-5, ramp_epochs=0.0)
    if recipe.method == "crt":
        recipe = replace(recipe, curvature="local", curvature_every=2, validate_every=2)
    return replace(experiment, layers=layers, recipe=recipe, start=experiment)


def _rivals(layers: int) -> dict[str, Experiment]:
    """The other methods, whose balls grow for half of the training where a bound is trained."""
    epochs = {"crt-published": 10, "ibp": 30, "lipschitz": 20, "standard": 8, "adversarial": 8,
              "crown-ibp": 12}  # fmt: skip
    # With more layers the published one ends with curvatures that nothing certifies, if not dearer.
    dear = {"crt-published": 0.05} if layers > 2 else {}
    bounds = {method: {"ramp_epochs": epochs[method] / 2} for method in _BOUNDS}
    found = {
        f"mnist-{layers}-softplus-{method}": Experiment(
            "mnist", layers, "softplus",
            Recipe(method, gamma=dear.get(method, 0.005), epochs=epochs[method],
                   attack_dtype="bfloat16", **bounds.get(method, {})),
            box=method == "crt-published",
        )
        for method in epochs
    }  # fmt: skip
    if layers > 3:  # from a random start a bound ends with one answer to all images
        shallow = _rivals(3)
        for method in _BOUNDS:
            start = shallow[f"mnist-3-softplus-{method}"]
            found[f"mnist-{layers}-softplus-{method}"] = _deeper(start, layers)
    return found


def _small_radius(layers: int) -> dict[str, Experiment]:
    """The setting of the paper's earlier version."""
    recipe = Recipe(radius=0.5, gamma=0.01, epochs=8, attack_dtype="bfloat16", validate_every=4)
    return {
        f"mnist-{layers}-sigmoid-{method}-0.5": Experiment(
            "mnist", layers, "sigmoid", replace(recipe, method=method), box=False, crown_images=150
        )
        for method in ("crt", "standard")
    }


def _quick() -> dict[str, Experiment]:
    recipe = partial(Recipe, radius=0.5, epochs=30, batch_size=64)
    return {
        f"digits-{layers}-softplus-{method}": Experiment(
            "digits",
            layers,
            "softplus",
            recipe(method, gamma=0.02, ramp_epochs=15),
            width=64,
            crown_images=20,
        )
        for layers in (2, 3)
        for method in ("crt", "ibp", "adversarial", "standard")
    }


def reproduce(
    wanted: dict[str, Experiment],
    results: Path | str,
    runs: Path | str,
    device: str = "cpu",
    progress: bool = False,
) -> list[Path]:
    """Run the experiments that have no record yet.

    Args:
        wanted: experiments by name.
        results: the folder of the records, ``NAME.json`` each.
        runs: the folder of checkpoints and weights, ``NAME/`` each; a training resumes there.
        device: where to run.
        progress: show progress bars.

    Returns:
        The records written by this call.

    Raises:
        RuntimeError: where a file cannot be written, or a record belongs to another experiment of
            that name: delete it to run it anew.
    """
    results, runs = Path(results), Path(runs)
    missing = {
        name: experiment
        for name, experiment in wanted.items()
        if not _is_recorded(results / f"{name}.json", experiment)
    }
    names = {own: name for name, own in (_quick() | _full() | wanted).items()}
    team = _Team.join()
    for name in list(missing)[team.rank :: team.size]:
        run_training(missing[name], runs / name, device, progress=progress, names=names)
    team.wait()
    written = []
    for name, experiment in missing.items():
        parts = _Parts.of(experiment, runs / name, device)
        mine = range(parts.count)[team.rank :: team.size]
        for part in tqdm(mine, name, disable=not progress, unit="part"):
            parts.ensure(part, progress)
        team.wait()
        if team.rank == 0:
            columns, seconds = parts.collect()
            training = read_json(runs / name / "run.json")
            record = {
                "name": name,
                **_facts(experiment),
                "rival": parts.rival,
                **summary(columns, experiment.recipe.radius),
                "radii": encode_radii(columns["radius"]),
                "bits": {
                    name: encode_bits(column)
                    for name, column in columns.items()
                    if column.dtype == torch.bool
                },
                **{key: training[key] for key in ("validation", "history")},
                "attack": _ATTACK,
                "seconds_an_epoch": training["seconds_an_epoch"],
                "seconds_to_certify": round(seconds, 1),
                "training_environment": training["environment"],
                "environment": environment(device) | {"processes": team.size},
                "command": f"python -m crcbook reproduce --only {name}",
            }
            path = results / f"{name}.json"
            write_json(path, record)
            written.append(path)
            parts.remove()
    return written


def load_records(folder: Path | str) -> dict[str, dict]:
    """Read the records of a folder.

    Args:
        folder: where :func:`reproduce` wrote them.

    Returns:
        Records by name.

    Raises:
        RuntimeError: where one cannot be read.
    """
    return {path.stem: read_json(path) for path in sorted(Path(folder).glob("*.json"))}


def _facts(experiment: Experiment) -> dict:
    facts = asdict(experiment)
    return facts | {"method": experiment.recipe.method, "radius": experiment.recipe.radius}


def _is_recorded(path: Path, experiment: Experiment) -> bool:
    if not path.exists():
        return False
    record = read_json(path)
    facts = json.loads(json.dumps(_facts(experiment)))
    differing = [key for key, value in facts.items() if record.get(key) != value]
    if differing:
        raise RuntimeError(
            f"{path} records another experiment of this name (its {', '.join(differing)} differs); "
            "delete it to run this one"
        )
    return True


def run_training(
    experiment: Experiment,
    folder: Path,
    device: str = "cpu",
    resume: bool = True,
    progress: bool = False,
    names: Mapping[Experiment, str] | None = None,
) -> tuple[nn.Sequential, dict]:
    """Train an experiment's network, or go on where its folder's checkpoint ends.

    Writes ``model.safetensors`` and ``run.json``. What it starts from is trained in a folder beside
    this one, of its own name or ``start-...``, for all experiments that share it.

    Args:
        experiment: what to train.
        folder: where to keep it.
        device: where to run.
        resume: go on from the folder's checkpoint, if there is one.
        progress: show a progress bar.
        names: those of the experiments that have a folder of that name.

    Returns:
        The network, at its best epoch on the validation split, and the facts of ``run.json``.

    Raises:
        RuntimeError: where a file cannot be written or read, or the checkpoint belongs to another
            experiment.
    """
    start, about = experiment.start, {"dataset": experiment.dataset, "seed": experiment.seed}
    if start is not None:
        digest = hashlib.sha256(json.dumps(_facts(start)).encode()).hexdigest()[:8]
        about["start"] = f"start-{start.dataset}-{start.layers}-{start.activation}-{digest}"
        beside = folder.with_name((names or {}).get(start, about["start"]))
        start, _ = run_training(start, beside, device, resume, progress, names)
    data = load(experiment.dataset)
    items = min(_VALIDATION_ITEMS, len(data.train) // 6)
    training, validation = split_validation(data.train, items)
    hidden = [experiment.width] * (experiment.layers - 1)
    sizes = [data.inputs, *hidden, data.classes]
    if start is None:
        model = mlp(sizes, experiment.activation, experiment.seed).to(device)
    else:
        model = deepen(start, experiment.layers)
    path = folder / "run.json"
    known = read_json(path) if resume and path.exists() else {}
    history = train(model, training, experiment.recipe, validation, folder, resume, progress, about)
    trained_before = known.get("history") == history  # its seconds too
    best = best_epoch(history, experiment.recipe)
    seconds = sorted(record["seconds"] for record in history)
    facts = {
        "dataset": data.name,
        "sizes": sizes,
        "activation": experiment.activation,
        "recipe": asdict(experiment.recipe),
        "validation": {"epoch": best + 1, **history[best]},
        "history": history,
        "seconds_an_epoch": round(seconds[len(seconds) // 2], 2),
        "environment": known["environment"] if trained_before else environment(device),
    }
    write_json(path, facts)
    return model, facts


@dataclass(frozen=True)
class _Parts:
    """The evaluation of a trained network, a few test images at a time, each kept when it is done.

    What an interrupted one has kept counts for the same experiment, weights and program alone.
    """

    experiment: Experiment
    folder: Path
    model: nn.Sequential
    test: Split
    about: dict

    @classmethod
    def of(cls, experiment: Experiment, folder: Path, device: str) -> "_Parts":
        about = _facts(experiment) | {
            "weights": _digest([folder / "model.safetensors"]),
            "program": _digest(sorted(Path(__file__).parent.glob("*.py"))),
            "torch": torch.__version__,
            "device": torch.device(device).type,
        }
        model, test = load_model(folder).to(device), load(experiment.dataset).test
        return cls(experiment, folder, model, test, json.loads(json.dumps(about)))

    @property
    def rival(self) -> str | None:
        return _BOUNDS.get(self.experiment.recipe.method)

    @property
    def count(self) -> int:
        return -(-len(self.test) // _PART_ITEMS)

    def path(self, part: int) -> Path:
        return self.folder / f"evaluation-{part:03}.safetensors"

    def ensure(self, part: int, progress: bool) -> None:
        """Evaluate a part, unless it is kept."""
        path = self.path(part)
        if path.exists() and load_tensors(path)[1]["about"] == self.about:
            return
        experiment, started = self.experiment, time.time()
        test = self.test.take(slice(part, None, self.count))
        columns = evaluate(
            self.model,
            test,
            experiment.recipe.radius,
            experiment.box,
            local=True,
            rival=self.rival,
            progress=progress,
        )
        if experiment.crown_images:
            compared = len(range(part, experiment.crown_images, self.count))
            columns["radius_crown"] = _crown_radii(self.model, test, compared, progress)
        facts = {"about": self.about, "seconds": time.time() - started}
        save_tensors(path, columns, facts)

    def collect(self) -> tuple[dict[str, Tensor], float]:
        """The columns in the order of the test split, and the seconds of all parts together."""
        whole, seconds = {}, 0.0
        for part in range(self.count):
            columns, facts = load_tensors(self.path(part))
            seconds += facts["seconds"]
            for name, column in columns.items():
                empty = torch.empty(len(self.test), dtype=column.dtype)
                whole.setdefault(name, empty)[part :: self.count] = column
        return whole, seconds

    def remove(self) -> None:
        for part in range(self.count):
            self.path(part).unlink()


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

    found = attack(model, x, y, radius=radius, progress=progress, **_ATTACK)
    columns["survived"], points = ~found.success, found.point
    certified = certificate.radius >= radius
    # What the attack broke needs no certificate.
    if rival:
        rows, found = columns["survived"], torch.zeros_like(correct)
        if rows.any():
            found[rows] = rival_robust(model, x[rows], y[rows], radius, rival)
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
            options = _ATTACK | {"box": unit, "progress": progress}
            found = attack(model, x[rows], y[rows], radius=radius, **options)
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


def _digest(paths: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _crown_radii(model: nn.Sequential, test: Split, images: int, progress: bool) -> Tensor:
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


def encode_radii(radius: Tensor) -> str:
    """Radii in two bytes each, rounded down to ``RADIUS_UNIT``.

    Args:
        radius: ``(items,)``; what is above 65535 units, infinity too, counts as that many.

    Returns:
        Base64 text of little-endian integers.
    """
    units = (radius / RADIUS_UNIT).floor().clamp(max=65535).numpy().astype("<u2")
    return base64.b64encode(units.tobytes()).decode()


def decode_radii(text: str) -> Tensor:
    """What :func:`encode_radii` encoded.

    Args:
        text: a record's ``radii``.

    Returns:
        ``(items,)`` float64 radii.
    """
    units = base64.b64decode(text)
    return torch.from_numpy(np.frombuffer(units, "<u2").astype("f8")) * RADIUS_UNIT


def encode_bits(column: Tensor) -> str:
    """Yes or no for each item, in a bit each.

    Args:
        column: ``(items,)`` bool.

    Returns:
        Base64 text of the bits, the first item's the highest of the first byte.
    """
    return base64.b64encode(np.packbits(column.numpy()).tobytes()).decode()


def decode_bits(text: str, items: int) -> Tensor:
    """What :func:`encode_bits` encoded.

    Args:
        text: a column of a record's ``bits``.
        items: how many there are: a record's ``images``.

    Returns:
        ``(items,)`` bool.
    """
    packed = np.frombuffer(base64.b64decode(text), "u1")
    return torch.from_numpy(np.unpackbits(packed, count=items).astype(bool))


@dataclass(frozen=True)
class Paired:
    """Two answers to each of the same items.

    Attributes:
        both: items with two times yes.
        first: items with a yes from the first alone.
        second: items with a yes from the second alone.
        neither: the other items.
        p_value: how likely a split of ``first`` to ``second`` at least this uneven is, where a coin
            decides each item on which the two differ.
    """

    both: int
    first: int
    second: int
    neither: int
    p_value: float


def paired(first: Tensor, second: Tensor) -> Paired:
    """Compare two columns item by item, by the exact two-sided sign test (McNemar 1947).

    Items on which the two agree say nothing about which is better. If neither is, each of the n
    others falls to either side like a coin. Two networks on one test set differ on far fewer items
    than two test sets would, so this sees differences that intervals around two accuracies hide. It
    compares the two networks, not the two recipes: those need several seeds.

    Args:
        first: ``(items,)`` bool.
        second: ``(items,)`` bool, of the same items.

    Returns:
        The counts and the p-value.

    Raises:
        ValueError: where the two are not bool columns of one length.
    """
    if first.dtype != torch.bool or second.dtype != torch.bool or first.shape != second.shape:
        raise ValueError(
            "two bool columns of one length are compared; got "
            f"{first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}"
        )
    alone, other = int((first & ~second).sum()), int((second & ~first).sum())
    differing = alone + other
    # Whole numbers: no rounding until the end.
    tail = sum(math.comb(differing, count) for count in range(min(alone, other) + 1))
    p_value = min(1.0, float(Fraction(2 * tail, 2**differing)))
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    return Paired(both, alone, other, neither, p_value)


def environment(device: str) -> dict:
    """What a figure depends on beside its command.

    Args:
        device: the torch device used.

    Returns:
        Versions, the device's name, the time and, in a checkout, the commit.
    """
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": name,
        "bfloat16": knows_bfloat16(device),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the checkout this file belongs to, which is not any that it happens to lie in."""
    here = Path(__file__).resolve()
    git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", here.name])
        return git(["git", "describe", "--always", "--dirty", "--abbrev=12"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True)
class _Team:
    """The processes that share the work: one, unless ``torchrun`` started more."""

    rank: int
    size: int

    @classmethod
    def join(cls) -> "_Team":
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and not distributed.is_initialized():
            # One waits for another's training at most this long.
            distributed.init_process_group("gloo", timeout=timedelta(days=2))
        return cls(int(os.environ.get("RANK", "0")) if size > 1 else 0, size)

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()
