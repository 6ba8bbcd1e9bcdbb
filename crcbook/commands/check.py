"""``python -m crcbook check``: have the independent checker decide whether proofs are true."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from crcbook.activations import ACTIVATIONS
from crcbook.checkpoints import read_json
from crcbook.commands.arguments import path
from crcbook.commands.items import read_arrays
from crcbook.datasets import DATASETS, load

SUMMARY = "check a file of `prove` in ball arithmetic, by a program that shares no code with it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments.

    Args:
        parser: the command's.
    """
    add = parser.add_argument
    add("proofs", type=path, help="what `prove` wrote")
    add("model", type=path, help="folder of a run of `train`, or a .safetensors file of weights")
    add("--dataset", choices=DATASETS, help="whose test images; that of the run where not given")
    add("--data", type=path, metavar="FILE", help="in its place: what `prove` was given")
    add("--labels", type=path, metavar="FILE", help="an .npy with the labels of --data")
    add("--activation", choices=ACTIVATIONS, help="between the layers, if the file does not say")
    add("--cache", type=path, metavar="FILE", help="keeps the curvatures: a file of yours alone")


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what was typed.

    Raises:
        ImportError: where python-flint is missing.
        RuntimeError: where a claim is not proved, or a file cannot be read.
        ValueError: where it is not said which items the proofs are about.
    """
    try:
        from crcbook_checker import check
    except ImportError as error:
        raise ImportError(
            f"check needs what crcbook[check] installs ({error}): pip install python-flint"
        ) from error
    weights = options.model / "model.safetensors" if options.model.is_dir() else options.model
    words = [f"--{name}={getattr(options, name)}" for name in ("activation", "cache")
             if getattr(options, name) is not None]  # fmt: skip
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        x, y = _items(options)
        np.savez(data, x=x, y=_claimed(options.proofs, len(x)) if y is None else y)
        if check.main([str(options.proofs), str(weights), str(data), *words]):
            raise RuntimeError(f"{options.proofs} is not proved")


def _claimed(path: Path, count: int) -> np.ndarray:
    """The labels that the proofs are about, for items that have no others."""
    labels = np.zeros(count, dtype=np.int64)
    try:
        tensors = load_file(path)
        labels[tensors["index"]] = tensors["label"]
    except (OSError, LookupError, SafetensorError) as error:
        raise RuntimeError(f"cannot read {path} as proofs of these items: {error}") from error
    return labels


def _items(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray | None]:
    """The inputs ``(items, n)`` in float64, and their labels where they have any."""
    if options.data is not None:
        if options.dataset is not None:
            raise ValueError("name one source of items: --dataset NAME or --data FILE")
        x, y = read_arrays(options.data, options.labels)
    else:
        facts: Path = options.model / "run.json"
        dataset = options.dataset or (read_json(facts).get("dataset") if facts.exists() else None)
        if dataset is None:
            raise ValueError(
                f"{options.model} does not say what it was trained on: give --data FILE or "
                "--dataset NAME"
            )
        test = load(dataset).test
        x, y = test.x, test.y
    x = x[None] if x.dim() == 1 else x
    return x.flatten(1).double().numpy(), None if y is None else y.numpy()
