"""``python -m crcbook train``: train a network and keep its best epoch."""

import argparse
import inspect
import re
from dataclasses import fields

from crcbook.activations import ACTIVATIONS
from crcbook.checkpoints import save_model, write_json
from crcbook.commands.arguments import add_device, count, path
from crcbook.datasets import DATASETS
from crcbook.experiments import Experiment, run_training
from crcbook.outputs import check_writable
from crcbook.training import CHOICES, Recipe

SUMMARY = "train a network and keep its best epoch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments.

    Args:
        parser: the command's.
    """
    add = parser.add_argument
    add("--dataset", choices=DATASETS, required=True, help="what to train on")
    add("--layers", type=count, default=2, help="linear layers; 2 is one hidden layer")
    add("--width", type=count, default=1024, help="units of a hidden layer")
    add("--activation", choices=ACTIVATIONS, default="softplus", help="between the layers")
    recipe = parser.add_argument_group("recipe", "as crcbook.Recipe explains")
    for field in fields(Recipe):
        options = {"type": field.type, "choices": CHOICES.get(field.name)}
        default = field.default
        if field.type is bool:
            options = {"action": "store_true"}
        if field.name == "gamma":  # of several, validation keeps one
            options["nargs"], default = "+", [default]
        recipe.add_argument(f"--{field.name.replace('_', '-')}", default=default, **options,
                            help=_help(field.name))  # fmt: skip
    add("--out", type=path, required=True, help="folder of the run")
    add("--resume", action="store_true", help="go on from the run's checkpoints")
    add_device(parser)


def _help(name: str) -> str:
    """What the docstring of Recipe says of a field; python -OO has none."""
    entries = inspect.getdoc(Recipe) or ""
    found = re.search(rf"\n    {name}: (.*?)(\n    \w+: |$)", entries, re.DOTALL)
    text = " ".join(found[1].split()) if found else ""
    return re.sub(r":\w+:|`", "", text).rstrip(".").replace("%", "%%")


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what was typed.

    Raises:
        RuntimeError: where a file cannot be written or read, or belongs to another run.
        ValueError: for settings that make no training, or a folder that already holds one.
    """
    options.after_interrupt = "; --resume goes on from the last epoch"
    files = ("model.safetensors", "checkpoint.safetensors", "gamma-*/checkpoint.safetensors")
    finished, *begun = [any(options.out.glob(file)) for file in files]
    if (finished or any(begun)) and not options.resume:
        kind = "a finished" if finished else "an unfinished"
        raise ValueError(f"{options.out} holds {kind} run: --resume it, or name another --out")
    if (options.out / "run.json").exists() and not (finished or any(begun)):
        raise ValueError(f"{options.out} holds a run.json of something else: name another --out")
    if begun[len(options.gamma) == 1]:
        raise ValueError(f"{options.out} holds a run with another number of --gamma values")
    if abs(options.seed) >= 2**63:
        raise ValueError(f"--seed must lie between -2**63 and 2**63; got {options.seed}")
    names = [f"gamma-{gamma:g}" for gamma in options.gamma]
    if len(set(names)) < len(names):  # each has a folder of its name
        raise ValueError("--gamma names a value twice, to six digits: leave one out")
    runs = []
    given = {field.name: getattr(options, field.name) for field in fields(Recipe)}
    recipes = [Recipe(**given | {"gamma": gamma}) for gamma in options.gamma]
    check_writable(options.out / "model.safetensors")
    for name, recipe in zip(names, recipes, strict=True):
        experiment = Experiment(options.dataset, options.layers, options.activation, recipe,
                                options.width, options.seed)  # fmt: skip
        folder = options.out if len(recipes) == 1 else options.out / name
        trained = run_training(experiment, folder, options.device, options.resume, options.progress)
        runs.append(trained)
    model, facts = max(runs, key=lambda run: run[1]["validation"]["certified_accuracy"])
    save_model(options.out / "model.safetensors", model)
    facts["candidates"] = [run[1]["validation"] | run[1]["recipe"] for run in runs]
    write_json(options.out / "run.json", facts)
    chosen = facts["validation"]
    print(f"kept epoch {chosen['epoch']} of gamma {facts['recipe']['gamma']:g}: validation clean "
          f"{chosen['clean_accuracy']:.2%}, certified {chosen['certified_accuracy']:.2%} at radius "
          f"{options.radius:g}")  # fmt: skip
    print(f"wrote {options.out / 'model.safetensors'}")
