"""The command line: ``python -m crcbook train``, ``certify`` and ``reproduce``."""

import argparse
import inspect
import os
import re
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

from crcbook.activations import ACTIVATIONS
from crcbook.checkpoints import load_model, read_json, save_model, write_json
from crcbook.checks import as_radius
from crcbook.datasets import DATASETS, load
from crcbook.experiments import (
    PROFILES,
    Experiment,
    environment,
    evaluate,
    experiments,
    reproduce,
    run_training,
    summary,
)
from crcbook.networks import read_network
from crcbook.training import CHOICES, Recipe


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; ``sys.argv`` where None.

    Returns:
        The exit status: 0, 1 after an error that was explained, or 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        _check_device(options.device)
        options.run(options)
    except (ValueError, TypeError, RuntimeError) as error:
        print(f"crcbook: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last epoch" if "resume" in options else ""
        print(f"crcbook: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crcbook",
        description="Provable robustness by curvature: train and certify networks.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, add, text in (
        ("train", _add_train, "train a network and keep its best epoch"),
        ("certify", _add_certify, "certify a trained network's test images"),
        ("reproduce", _add_reproduce, "run the book's experiments that have no record yet"),
    ):
        add(commands.add_parser(name, help=text, description=text, formatter_class=_Help))
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every default, where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


def _own_device() -> str:
    """The GPU of this process's number among those of its machine; without one, the processor."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise ValueError(f"--device {name} cannot be used: {error}") from error


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", choices=DATASETS, required=True, help="what to train on")
    add("--layers", type=int, default=2, help="linear layers; 2 is one hidden layer")
    add("--width", type=int, default=1024, help="units of a hidden layer")
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
    add("--out", type=Path, required=True, help="folder of the run")
    add("--resume", action="store_true", help="go on from the run's checkpoints")
    add("--device", default=_own_device(), help="where to compute")
    parser.set_defaults(run=_train)


def _help(name: str) -> str:
    """What the docstring of Recipe says of a field; python -OO has none."""
    entries = inspect.getdoc(Recipe) or ""
    found = re.search(rf"\n    {name}: (.*?)(\n    \w+: |$)", entries, re.DOTALL)
    text = " ".join(found[1].split()) if found else ""
    return re.sub(r":\w+:|`", "", text).rstrip(".").replace("%", "%%")


def _add_certify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_folder", type=Path, metavar="run", help="folder of the run, or a .safetensors model")
    add("--dataset", choices=DATASETS, help="whose test images; that of the run where not given")
    add("--radius", type=float,
        help="l2 radius to report accuracies at; that of the run where not given")  # fmt: skip
    add("--box", action="store_true", help="also with an adversary confined to pixels in [0, 1]")
    add("--local", action="store_true",
        help="also with the curvature of the ball around each image")  # fmt: skip
    add("--limit", type=int, help="certify only the first images")
    add("--json", type=Path, help="write the figures here")
    add("--device", default=_own_device(), help="where to compute")
    parser.set_defaults(run=_certify)


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="full",
        help="full: the book's tables, hours; quick: the bundled digits, minutes")  # fmt: skip
    add("--only", nargs="+", metavar="NAME", help="run these experiments alone")
    add("--results", type=Path,
        help="folder of the records; where not given, book/results (full) or results below --runs "
        "(quick)")  # fmt: skip
    add("--runs", type=Path, default=Path("runs"), help="folder of checkpoints and weights")
    add("--device", default=_own_device(), help="where to compute")
    parser.set_defaults(run=_reproduce)


def _train(options: argparse.Namespace) -> None:
    if options.layers < 1:
        raise ValueError(f"--layers must be at least 1; got {options.layers}")
    names = ("model.safetensors", "checkpoint.safetensors", "gamma-*/checkpoint.safetensors")
    finished, *begun = [any(options.out.glob(name)) for name in names]
    if (finished or any(begun)) and not options.resume:
        kind = "a finished" if finished else "an unfinished"
        raise ValueError(f"{options.out} holds {kind} run: --resume it, or name another --out")
    if begun[len(options.gamma) == 1]:
        raise ValueError(f"{options.out} holds a run with another number of --gamma values")
    runs = []
    given = {field.name: getattr(options, field.name) for field in fields(Recipe)}
    for gamma in options.gamma:
        recipe = Recipe(**given | {"gamma": gamma})
        experiment = Experiment(options.dataset, options.layers, options.activation, recipe,
                                options.width, options.seed)  # fmt: skip
        folder = options.out if len(options.gamma) == 1 else options.out / f"gamma-{gamma:g}"
        runs.append(run_training(experiment, folder, options.device, options.resume, True))
    model, facts = max(runs, key=lambda run: run[1]["validation"]["certified_accuracy"])
    save_model(options.out / "model.safetensors", model)
    facts["candidates"] = [run[1]["validation"] | run[1]["recipe"] for run in runs]
    write_json(options.out / "run.json", facts)
    chosen = facts["validation"]
    print(f"kept epoch {chosen['epoch']} of gamma {facts['recipe']['gamma']:g}: validation clean "
          f"{chosen['clean_accuracy']:.2%}, certified {chosen['certified_accuracy']:.2%} at radius "
          f"{options.radius:g}")  # fmt: skip
    print(f"wrote {options.out / 'model.safetensors'}")


def _certify(options: argparse.Namespace) -> None:
    path = options.run_folder
    model = load_model(path).to(options.device)
    facts = path / "run.json"
    known = read_json(facts) if facts.exists() else {}
    dataset = options.dataset or known.get("dataset")
    radius = known.get("recipe", {}).get("radius") if options.radius is None else options.radius
    if dataset is None or radius is None:
        raise ValueError(f"{path} is no folder of a run: --dataset and --radius must be given")
    radius, data, inputs = as_radius(radius), load(dataset), read_network(model).inputs
    if data.inputs != inputs:
        raise ValueError(f"{dataset} has {data.inputs} values an item, the network takes {inputs}")
    test = data.test
    if options.limit is not None:
        if options.limit < 1:
            raise ValueError(f"--limit must be at least 1; got {options.limit}")
        test = test.take(slice(0, options.limit))
    started = time.time()
    columns = evaluate(model, test, radius, options.box, options.local, progress=True)
    figures = {"radius": radius, **summary(columns, radius)}
    figures["seconds"] = round(time.time() - started, 3)
    for name, value in figures.items():
        print(f"{name:30} {'none' if value is None else format(value, '.6g')}")
    if options.json:
        asked = {"model": str(path), "dataset": dataset, "box": options.box, "local": options.local}
        record = asked | figures | {"environment": environment(options.device)}
        write_json(options.json, record)
        print(f"wrote {options.json}")


def _reproduce(options: argparse.Namespace) -> None:
    wanted = experiments(options.profile)
    if options.only:
        unknown = sorted(set(options.only) - set(wanted))
        if unknown:
            raise ValueError(
                f"the {options.profile} profile has no experiment {', '.join(unknown)}; "
                f"it has {', '.join(wanted)}"
            )
        wanted = {name: wanted[name] for name in options.only}
    results = options.results or (
        Path("book/results") if options.profile == "full" else options.runs / "results"
    )
    written = reproduce(wanted, results, options.runs, options.device, progress=True)
    for name in wanted:
        path = results / f"{name}.json"
        if path.exists():
            record = read_json(path)
            figures = f"clean {record['clean_accuracy']:.2%}  "
            figures += f"certified {record['certified_accuracy']:.2%}"
            print(f"{name:34} {figures}  {'new' if path in written else 'recorded'} {path}")


if __name__ == "__main__":
    sys.exit(main())
