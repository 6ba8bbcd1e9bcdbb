"""``python -m crcbook check``: have the independent checker decide whether proofs are true."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from crcbook.activations import ACTIVATIONS
from crcbook.checkpoints import read_json
from crcbook.checks import read_items
from crcbook.commands.arguments import path
from crcbook.commands.items import (
    arrays_of,
    check_is_file,
    check_source,
    checked_labels,
    fitting,
    read_run,
)
from crcbook.datasets import DATASETS
from crcbook.networks import mlp
from crcbook.outputs import check_writable

if TYPE_CHECKING:  # it needs python-flint
    from crcbook_checker.check import Proofs

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
        TypeError: for arrays of the wrong kind.
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
    for file in (options.proofs, weights):
        check_is_file(file)
    with _what_is_wanted():
        proofs = check.Proofs(options.proofs)
        model = _of_same_sizes(check.read_tensors(weights)[0], weights)
    x, y = _items(options, model, proofs)
    with _what_is_wanted(), TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, x=x, y=y)
        status = check.main([str(options.proofs), str(weights), str(data), *words])
    if status:
        raise RuntimeError(f"{options.proofs} is not proved, as the lines above say; {_WANTED}")


@contextmanager
def _what_is_wanted() -> Iterator[None]:
    """Say what the checker takes where it refuses something."""
    try:
        yield
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise RuntimeError(f"{error}; {_WANTED}") from error


def _of_same_sizes(tensors: dict[str, np.ndarray], path: Path) -> nn.Module:
    """A network that takes and answers what that of a file does: all that items are held against.

    Its weights are the checker's own business.
    """
    weights = {int(name.split(".")[-2]): one for name, one in tensors.items()
               if re.search(r"(^|\.)\d+\.weight$", name) and one.ndim == 2}  # fmt: skip
    if not weights:
        raise ValueError(f"{path} has no layers 1.weight, 1.bias")
    return mlp([weights[min(weights)].shape[1], len(weights[max(weights)])])


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


def _items(
    options: argparse.Namespace, model: nn.Module, proofs: "Proofs"
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs ``(items, n)`` in float64 and their labels, as far as the proofs are about them.

    They are looked at as ``certify`` looks at its own. Where no label is given it is the proofs'.
    """
    dataset = options.dataset or (None if options.data else read_run(options.model).get("dataset"))
    if dataset is None and options.data is None:
        raise ValueError(
            f"{options.model} does not say what it was trained on: give --data FILE or "
            "--dataset NAME"
        )
    source = str(options.data or dataset)
    x, y = fitting(*arrays_of(options, dataset), model, source)
    count = max(proofs.index, default=0) + 1
    if count > len(x):
        raise ValueError(f"{options.proofs} is about more than the {len(x)} items of {source}")
    x, y = x[:count], None if y is None else y[:count]
    network, checked = read_items(model, x)
    labels = np.zeros(len(checked), dtype=np.int64)
    labels[proofs.index] = proofs.label
    if y is not None:
        labels = checked_labels(y, network, checked, str(options.labels or source)).numpy()
    return checked.x.numpy(), labels
