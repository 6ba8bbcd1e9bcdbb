"""Running experiments: training, evaluating and recording what has no record yet.

Started by ``torchrun``, several processes share the trainings, and then the test images of each
network.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from tqdm.auto import tqdm

from crcbook.checkpoints import load_model, load_tensors, read_json, save_tensors, write_json
from crcbook.datasets import Split, load, split_validation
from crcbook.experiments.catalogue import BOUNDS, Experiment, full, quick
from crcbook.experiments.evaluation import ATTACK, crown_radii, evaluate, summary
from crcbook.experiments.records import PACKAGE, digest, encode_bits, encode_radii, environment
from crcbook.networks import deepen, mean_of, mlp, nearly_linear
from crcbook.outputs import check_writable, locked
from crcbook.training import best_epoch, train

_VALIDATION_ITEMS = 5000
_PART_ITEMS = 250  # evaluated together: what an interrupted evaluation loses


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
        RuntimeError: where a file cannot be written, another process works in a folder of ``runs``,
            or a record belongs to another experiment of that name: delete it to run it anew.
    """
    results, runs = Path(results), Path(runs)
    missing = {
        name: experiment
        for name, experiment in wanted.items()
        if not _is_recorded(results / f"{name}.json", experiment)
    }
    names = {own: name for name, own in (quick() | full() | wanted).items()}
    team = _Team.join()
    for name in list(missing)[team.rank :: team.size]:
        run_training(missing[name], runs / name, device, progress=progress, names=names)
    team.wait()
    written = []
    for name, experiment in missing.items():
        with nullcontext() if team.rank else locked(runs / name):
            parts = _Parts.of(experiment, runs / name, device)
            mine = range(parts.count)[team.rank :: team.size]
            for part in tqdm(mine, name, disable=not progress, unit="part"):
                parts.ensure(part)
            team.wait()
            if team.rank == 0:
                where = environment(device) | {"processes": team.size}
                training = read_json(runs / name / "run.json")
                record = _record(name, experiment, parts, training, where)
                path = results / f"{name}.json"
                write_json(path, record)
                written.append(path)
                parts.remove()
    return written


def _record(
    name: str, experiment: Experiment, parts: "_Parts", training: dict, where: dict
) -> dict:
    """What is recorded of a finished experiment that was evaluated somewhere."""
    columns, seconds = parts.collect()
    bits = {key: column for key, column in columns.items() if column.dtype == torch.bool}
    return {
        "name": name,
        **_facts(experiment),
        "rival": parts.rival,
        **summary(columns, experiment.recipe.radius),
        "radii": encode_radii(columns["radius"]),
        "bits": {key: encode_bits(column) for key, column in bits.items()},
        **{key: training[key] for key in ("validation", "history")},
        "attack": ATTACK,
        "seconds_an_epoch": training["seconds_an_epoch"],
        "seconds_to_certify": round(seconds, 1),
        "training_environment": training["environment"],
        "environment": where,
        "command": f"python -m crcbook reproduce --only {name}",
    }


# Of these choices older records and folders say nothing: there was one way.
_NEWER = {
    "initial": "default",
    "test_images": None,
    "augment": False,
    "mirror": False,
    "centred": False,
    "ball": 0.5,
}


def _facts(experiment: Experiment) -> dict:
    facts = asdict(experiment, dict_factory=lambda items: {
        key: value for key, value in items if (key, value) not in _NEWER.items()
    })  # fmt: skip
    return facts | {"method": experiment.recipe.method, "radius": experiment.recipe.radius}


def _is_recorded(path: Path, experiment: Experiment) -> bool:
    if not path.exists():
        return False
    record = read_json(path)
    facts = json.loads(json.dumps(_facts(experiment)))
    unsaid = [key for key in _NEWER if key in record and key not in facts]
    differing = unsaid + [key for key, value in facts.items() if record.get(key) != value]
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
        RuntimeError: where a file cannot be written or read, another process that ``torchrun`` did
            not start along with this one trains in the folder, or the checkpoint belongs to another
            experiment.
    """
    about: dict[str, Any] = {"dataset": experiment.dataset, "seed": experiment.seed}
    starts: list[nn.Sequential] = []
    for start in experiment.starts:
        digest = hashlib.sha256(json.dumps(_facts(start)).encode()).hexdigest()[:8]
        own = f"start-{start.dataset}-{start.layers}-{start.activation}-{digest}"
        about["start"] = f"{about['start']} {own}" if starts else own
        beside = folder.with_name((names or {}).get(start, own))
        starts.append(run_training(start, beside, device, resume, progress, names)[0])
    check_writable(folder / "run.json")
    with locked(folder, wait=_processes() > 1):
        data = load(experiment.dataset)
        items = min(_VALIDATION_ITEMS, len(data.train) // 6)
        training, validation = split_validation(data.train, items)
        hidden = [experiment.width] * (experiment.layers - 1)
        sizes = [data.inputs, *hidden, data.classes]
        if not starts:
            model = mlp(sizes, experiment.activation, experiment.seed).to(device)
            if experiment.initial == "nearly linear":
                model = nearly_linear(model, experiment.seed)
        else:
            model = deepen(mean_of(starts), experiment.layers)
        path = folder / "run.json"
        known = read_json(path) if resume and path.exists() else {}
        history = train(
            model, training, experiment.recipe, validation, folder, resume, progress, about
        )
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
    model: nn.Module
    test: Split
    about: dict

    @classmethod
    def of(cls, experiment: Experiment, folder: Path, device: str) -> "_Parts":
        about = _facts(experiment) | {
            "weights": digest([folder / "model.safetensors"]),
            "program": digest(sorted(PACKAGE.rglob("*.py"))),
            "torch": torch.__version__,
            "device": torch.device(device).type,
        }
        model = load_model(folder).to(device)
        test = load(experiment.dataset).test.take(slice(0, experiment.test_images))
        return cls(experiment, folder, model, test, json.loads(json.dumps(about)))

    @property
    def rival(self) -> str | None:
        return BOUNDS.get(self.experiment.recipe.method)

    @property
    def count(self) -> int:
        return -(-len(self.test) // _PART_ITEMS)

    def path(self, part: int) -> Path:
        return self.folder / f"evaluation-{part:03}.safetensors"

    def ensure(self, part: int) -> None:
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
        )
        if experiment.crown_images:
            compared = len(range(part, experiment.crown_images, self.count))
            columns["radius_crown"] = crown_radii(self.model, test, compared)
        facts = {"about": self.about, "seconds": time.time() - started}
        save_tensors(path, columns, facts)

    def collect(self) -> tuple[dict[str, Tensor], float]:
        """The columns in the order of the test split, and the seconds of all parts together."""
        whole: dict[str, Tensor] = {}
        seconds = 0.0
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


def _processes() -> int:
    """How many ``torchrun`` started; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class _Team:
    """The processes that share the work: one, unless ``torchrun`` started more."""

    rank: int
    size: int

    @classmethod
    def join(cls) -> "_Team":
        size = _processes()
        if size > 1 and not distributed.is_initialized():
            # One waits for another's training at most this long.
            distributed.init_process_group("gloo", timeout=timedelta(days=2))
        return cls(int(os.environ.get("RANK", "0")) if size > 1 else 0, size)

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()
