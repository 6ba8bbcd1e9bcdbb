"""The data of the book: toys in the plane, bundled digits, MNIST and Fashion-MNIST.

Images are float32 with pixels in [0, 1]; labels are int64.
"""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

TOYS = ("moons", "circles", "blobs")
DATASETS = (*TOYS, "digits", "mnist", "fashion-mnist")


@dataclass(frozen=True)
class Split:
    """Inputs and their labels.

    Attributes:
        x: ``(items, *input_shape)`` float32.
        y: ``(items,)`` int64.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """The number of items."""
        return len(self.y)

    def take(self, index: slice | Tensor) -> "Split":
        """The items at ``index``.

        Args:
            index: a slice or a tensor of positions.

        Returns:
            The chosen items.
        """
        return Split(self.x[index], self.y[index])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split.

    Attributes:
        name: one of ``DATASETS``.
        train: what training may see.
        test: what is looked at once, at the end.
    """

    name: str
    train: Split
    test: Split

    @property
    def inputs(self) -> int:
        """The number of input coordinates."""
        return self.train.x[0].numel()

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train.y.max()) + 1


def load(name: str, seed: int = 0) -> Dataset:
    """Load a dataset by name.

    MNIST and Fashion-MNIST are read from the folder named by the environment variable
    ``CRCBOOK_DATA`` (``~/.cache/crcbook`` where it is unset) and downloaded where missing; the
    others need no network.

    Args:
        name: one of ``DATASETS``.
        seed: the seed of the toys' noise; ignored by the others.

    Returns:
        The dataset.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: where the files are missing and cannot be downloaded, or the package that
            brings or reads the data is.
    """
    if name in TOYS:
        return _toy(name, seed)
    if name == "digits":
        return _digits()
    if name in ("mnist", "fashion-mnist"):
        return _torchvision(name)
    raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {name!r}")


def split_validation(train: Split, items: int, seed: int = 0) -> tuple[Split, Split]:
    """Hold out a validation set, to choose with; the test set is for reporting.

    Args:
        train: the training split.
        items: how many items to hold out.
        seed: the seed of the shuffle.

    Returns:
        The remaining training items and the validation items.

    Raises:
        ValueError: where ``items`` is not between 1 and the number of training items less 1.
    """
    if not 0 < items < len(train):
        raise ValueError(f"items must be between 1 and {len(train) - 1}; got {items}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator, device="cpu")
    return train.take(order[items:]), train.take(order[:items])


def _module(module: str, name: str) -> ModuleType:
    """A module that certificates do without, and a dataset does not."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(root := module.split(".")[0], root)
        raise RuntimeError(
            f"{name} needs {package}, one of the extras of crcbook[experiments]: "
            f"pip install {package}"
        ) from error


def _tensors(x: np.ndarray, y: np.ndarray) -> Split:
    return Split(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64))


def _toy(name: str, seed: int) -> Dataset:
    datasets = _module("sklearn.datasets", name)
    make = {
        "moons": lambda s: datasets.make_moons(600, noise=0.12, random_state=s),
        "circles": lambda s: datasets.make_circles(600, noise=0.08, factor=0.45, random_state=s),
        "blobs": lambda s: datasets.make_blobs(
            600, centers=[(-1, -0.7), (1, -0.7), (0, 1)], cluster_std=0.4, random_state=s
        ),
    }[name]
    x, y = make(seed)
    split = _tensors(x, y)
    return Dataset(name, split.take(slice(0, 400)), split.take(slice(400, None)))


def _digits() -> Dataset:
    digits = _module("sklearn.datasets", "digits").load_digits()
    split = _tensors(digits.images / 16.0, digits.target)
    # The bundled file lists writers in turn: a fixed shuffle mixes them.
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(split), generator=generator, device="cpu")
    return Dataset("digits", split.take(order[:1297]), split.take(order[1297:]))


def _torchvision(name: str) -> Dataset:
    datasets = _module("torchvision.datasets", name)
    root = Path(os.environ.get("CRCBOOK_DATA") or Path.home() / ".cache" / "crcbook")
    factory = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[name]
    try:
        parts = [factory(root, train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise RuntimeError(
            f"{name} is not in {root} and could not be downloaded ({error}). Set CRCBOOK_DATA to a "
            "folder that torchvision can read it from, or run once where there is a network."
        ) from error
    train, test = (_tensors(part.data.numpy() / 255.0, part.targets.numpy()) for part in parts)
    return Dataset(name, train, test)
