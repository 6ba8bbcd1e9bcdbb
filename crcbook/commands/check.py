"""``python -m crcbook check``: have the independent checker decide whether proofs are true."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from crcbook.activations import ACTIVATIONS
from crcbook.checkpoints import read_json
from crcbook.commands.arguments import path
from crcbook.commands.items import check_source, fitting_labels, read_arrays, read_run
from crcbook.datasets import DATASETS, load
from crcbook.outputs import check_writable

_WANTED = "check wants what `prove` wrote, and the network and the items that `prove` was given"
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
        RuntimeError: where a claim is not proved, or a file cannot be read or written.
        ValueError: where it is not said which items the proofs are about, or it cannot be these.
    """
    try:
        from crcbook_checker import check
    except ImportError as error:
        raise ImportError(
            f"check needs what crcbook[check] installs ({error}): pip install python-flint"
        ) from error
    check_source(options)
    weights = options.model / "model.safetensors" if options.model.is_dir() else options.model
    if weights.suffix in (".onnx", ".pt", ".pth"):
        raise ValueError(
            "check reads .safetensors alone: have crcbook.save_model write what "
            f"crcbook.load_model reads from {weights}"
        )
    if options.cache is not None:
        _check_cache(options.cache)
    words = [f"--{name}={getattr(options, name)}" for name in ("activation", "cache")
             if getattr(options, name) is not None]  # fmt: skip
    x, y = _items(options)
    try:
        proofs = check.Proofs(options.proofs)
        if max(proofs.index, default=0) >= len(x):
            raise ValueError(f"{options.proofs} is about more than these {len(x)} items")
        if y is None:  # those that the proofs are about
            y = np.zeros(len(x), dtype=np.int64)
            y[proofs.index] = proofs.label
        with TemporaryDirectory() as folder:
            data = Path(folder) / "data.npz"
            np.savez(data, x=x, y=y)
            status = check.main([str(options.proofs), str(weights), str(data), *words])
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise RuntimeError(f"{error}; {_WANTED}") from error
    if status:
        raise RuntimeError(f"{options.proofs} is not proved, as the lines above say; {_WANTED}")


def _check_cache(cache: Path) -> None:
    """Check, before the work, that curvatures can be kept in a file, and that no other is lost."""
    check_writable(cache)
    if not cache.exists():
        return
    try:
        ours = all(isinstance(one, dict) for one in read_json(cache).values())
    except RuntimeError:
        ours = False
    if not ours:
        raise ValueError(f"{cache} is no whole cache of curvatures: name another --cache")


def _items(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray | None]:
    """The inputs ``(items, n)`` in float64, and their labels where they have any."""
    if options.data is not None:
        x, y = read_arrays(options.data, options.labels)
    else:
        dataset = options.dataset or read_run(options.model).get("dataset")
        if dataset is None:
            raise ValueError(
                f"{options.model} does not say what it was trained on: give --data FILE or "
                "--dataset NAME"
            )
        test = load(dataset).test
        x, y = test.x, test.y
    x = x[None] if x.dim() == 1 else x
    y = fitting_labels(y, len(x))
    y = y if y is None or y.dim() == 1 else y.argmax(1)  # of one-hot rows
    return x.flatten(1).double().numpy(), None if y is None else y.numpy()
