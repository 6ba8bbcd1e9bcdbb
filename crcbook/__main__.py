"""The command line: ``python -m crcbook train`` and ``python -m crcbook certify``."""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from crcbook.activations import ACTIVATIONS
from crcbook.attacks import attack
from crcbook.certificate import certify
from crcbook.checkpoints import load_model, save_model, write_atomically
from crcbook.datasets import DATASETS, Dataset, Split, load, split_validation
from crcbook.networks import mlp
from crcbook.training import METHODS, Recipe, train


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; ``sys.argv`` where None.

    Returns:
        The exit status: 0, or 1 after an error that was explained.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, RuntimeError) as error:
        print(f"crcbook: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crcbook", description="Provable robustness by curvature: train and certify networks."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_train(commands.add_parser("train", help="train a network and keep its best epoch"))
    _add_certify(commands.add_parser("certify", help="certify a trained network's test images"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    recipe = Recipe()
    add = parser.add_argument
    add("--dataset", choices=DATASETS, required=True)
    add("--layers", type=int, default=2, help="linear layers; 2 is one hidden layer")
    add("--width", type=int, default=1024, help="units of a hidden layer")
    add("--activation", choices=ACTIVATIONS, default="softplus")
    add("--method", choices=METHODS, default=recipe.method)
    add("--radius", type=float, default=recipe.radius, help="l2 radius of the attack")
    add("--gamma", type=float, nargs="+", default=[recipe.gamma],
        help="weight of the curvature; of several, validation keeps one")  # fmt: skip
    add("--epochs", type=int, default=recipe.epochs)
    add("--batch-size", type=int, default=recipe.batch_size)
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="folder of the run")
    add("--resume", action="store_true", help="go on from the run's checkpoints")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(run=_train)


def _add_certify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_folder", type=Path, metavar="run", help="folder of the run, or a .safetensors model")
    add("--dataset", choices=DATASETS, required=True)
    add("--radius", type=float, default=Recipe().radius, help="l2 radius to report accuracies at")
    add("--box", action="store_true", help="also with an adversary confined to pixels in [0, 1]")
    add("--limit", type=int, help="certify only the first images")
    add("--json", type=Path, help="write the figures here")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(run=_certify)


def _train(options: argparse.Namespace) -> None:
    if options.layers < 1:
        raise ValueError(f"--layers must be at least 1; got {options.layers}")
    data = load(options.dataset)
    data_split = split_validation(data.train, min(5000, len(data.train) // 6))
    recipes = [
        Recipe(options.method, options.radius, gamma, options.epochs, options.batch_size,
               seed=options.seed)
        for gamma in options.gamma
    ]  # fmt: skip
    runs = [_train_one(options, recipe, data, *data_split) for recipe in recipes]
    model, facts = max(runs, key=lambda run: run[1]["validation"]["certified_accuracy"])
    save_model(options.out / "model.safetensors", model)
    facts["candidates"] = [run[1]["validation"] | run[1]["recipe"] for run in runs]
    write_atomically(options.out / "run.json", json.dumps(facts, indent=1).encode())
    chosen = facts["validation"]
    print(f"kept epoch {chosen['epoch']} of gamma {facts['recipe']['gamma']:g}: validation clean "
          f"{chosen['clean_accuracy']:.2%}, certified {chosen['certified_accuracy']:.2%} at radius "
          f"{options.radius:g}")  # fmt: skip
    print(f"wrote {options.out / 'model.safetensors'}")


def _train_one(options, recipe: Recipe, data: Dataset, training, validation):
    folder = options.out
    if len(options.gamma) > 1:
        folder = options.out / f"gamma-{recipe.gamma:g}"
    sizes = [data.inputs, *[options.width] * (options.layers - 1), data.classes]
    model = mlp(sizes, options.activation, options.seed).to(options.device)
    started = time.time()
    history = train(model, training, recipe, validation, folder, options.resume, progress=True)
    best = max(
        range(len(history)),
        key=lambda i: (history[i]["certified_accuracy"], history[i]["clean_accuracy"], i),
    )
    facts = {
        "dataset": data.name,
        "sizes": sizes,
        "activation": options.activation,
        "recipe": asdict(recipe),
        "validation": {"epoch": best + 1, **history[best]},
        "history": history,
        "seconds": round(time.time() - started, 1),
        "environment": environment(options.device),
    }
    return model, facts


def environment(device: str) -> dict:
    """What a figure depends on beside its command.

    Args:
        device: the torch device used.

    Returns:
        Versions and the device's name.
    """
    name = platform.machine() + f", {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"python": platform.python_version(), "torch": torch.__version__, "device": name}


def _certify(options: argparse.Namespace) -> None:
    path = options.run_folder
    model = load_model(path / "model.safetensors" if path.is_dir() else path).to(options.device)
    test = load(options.dataset).test
    if options.limit is not None:
        if options.limit < 1:
            raise ValueError(f"--limit must be at least 1; got {options.limit}")
        test = test.take(slice(0, options.limit))
    figures = report(model, test, options.radius, options.box)
    for name, value in figures.items():
        print(f"{name:30} {'none' if value is None else format(value, '.6g')}")
    if options.json:
        write_atomically(options.json, json.dumps(figures, indent=1).encode())
        print(f"wrote {options.json}")


def report(model: torch.nn.Sequential, test: Split, radius: float, box: bool = False) -> dict:
    """Certify and attack a test split.

    Args:
        model: the classifier.
        test: the images and labels.
        radius: the l2 radius the accuracies are for.
        box: also confine the adversary to pixels in [0, 1], in figures of their own.

    Returns:
        The figures by name: accuracies as fractions of all images, ``mean_radius`` and
        ``exact_fraction`` over the correctly classified (None where the mean is infinite or
        there are none), ``violations`` (attacks inside a certified ball: 0), ``seconds`` the
        certificates took.
    """
    started = time.time()
    certificate = certify(model, test.x, test.y, progress=True)
    seconds = time.time() - started
    runner_up = certify(model, test.x, test.y, targets="runner-up", progress=True)
    attacked = attack(model, test.x, test.y, radius=radius, progress=True)
    correct = (certificate.radius > 0) | ~certificate.exact
    robust = certificate.radius >= radius
    mean = certificate.radius[correct].mean().item()
    figures = {
        "images": len(test),
        "radius": radius,
        "clean_accuracy": correct.double().mean().item(),
        "certified_accuracy": robust.double().mean().item(),
        "certified_accuracy_runner_up": (runner_up.radius >= radius).double().mean().item(),
        "empirical_accuracy": (~attacked.success).double().mean().item(),
        "violations": int((robust & attacked.success).sum()),
        "mean_radius": mean if 0 <= mean < float("inf") else None,
        "exact_fraction": certificate.exact[correct].double().mean().nan_to_num().item(),
        "seconds": round(seconds, 3),
    }
    if box:
        confined = certify(model, test.x, test.y, box=(0.0, 1.0), progress=True)
        reached = attack(model, test.x, test.y, radius=radius, box=(0.0, 1.0), progress=True)
        robust = confined.radius >= radius
        figures |= {
            "certified_accuracy_box": robust.double().mean().item(),
            "empirical_accuracy_box": (~reached.success).double().mean().item(),
            "violations_box": int((robust & reached.success).sum()),
        }
    return figures


if __name__ == "__main__":
    sys.exit(main())
