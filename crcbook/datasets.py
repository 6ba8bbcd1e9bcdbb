"""The data of the book: toys in the plane, bundled digits, MNIST and Fashion-MNIST.

Images are float32 with pixels in [0, 1]; labels are int64.
"""

import hashlib
import importlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

TOYS = ("moons", "circles", "blobs")
DATASETS = (*TOYS, "digits", "mnist", "fashion-mnist")
# The items of each split, and what `_sums` gives of its images and labels.
_PUBLISHED = {
    "mnist": {
        "train": (60000, "516d080906b5ff1fb1bb28512f7c9cae", "f6df1131ebd1f670df947aa6d12ecd18"),
        "t10k": (10000, "416c78b75a65c2aaed89482a425e28b8", "c96757a4180a626e1737cfdf4690742f"),
    },
    "fashion-mnist": {
        "train": (60000, "04c96f6deb5873b98530765c9eb26b7a", "4115895a719d060966a54c7f2e69e159"),
        "t10k": (10000, "5533d2c6ef7e2c5d44280a7c4335e3b2", "4e6f7641d5ba513061f4658044048c5c"),
    },
}
_HEAD = {"images-idx3": 16, "labels-idx1": 8}  # bytes before the items
_VALUES = {"images-idx3": 784, "labels-idx1": 1}  # bytes an item


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
    others need no network. Every image and label is held against the published ones.

    Args:
        name: one of ``DATASETS``.
        seed: the seed of the toys' noise; ignored by the others.

    Returns:
        The dataset.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: where the files are damaged, or missing and cannot be downloaded, or the
            package that brings or reads the data is missing.
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
    root = Path(os.environ.get("CRCBOOK_DATA") or "~/.cache/crcbook").expanduser()
    factory = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[name]
    folder = root / factory.__name__ / "raw"
    for part, (items, *_) in _PUBLISHED[name].items():
        for kind, head in _HEAD.items():
            _check_size(folder / f"{part}-{kind}-ubyte", head + items * _VALUES[kind])
    for archive, md5 in factory.resources:
        _check_archive(folder / archive, md5)
    try:
        parts = [factory(root, train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise RuntimeError(
            f"{name} is not in {root} and could not be downloaded ({error}). Set CRCBOOK_DATA to a "
            "folder that torchvision can read it from, or run once where there is a network."
        ) from error
    for (part, (_, *published)), read in zip(_PUBLISHED[name].items(), parts, strict=True):
        found = _sums(read.data.numpy(), read.targets.numpy())
        for kind, one, wanted in zip(_HEAD, found, published, strict=True):
            if one != wanted:
                raise _damaged(folder / f"{part}-{kind}-ubyte", f"some are not those of {name}")
    train, test = (_tensors(part.data.numpy() / 255.0, part.targets.numpy()) for part in parts)
    return Dataset(name, train, test)


def _sums(images: np.ndarray, labels: np.ndarray) -> tuple[str, str]:
    """What identifies images, and images with their labels, in whatever order they stand.

    A file's own checksum would refuse copies that were made from single pictures.
    """
    pixels = images.reshape(len(images), -1)
    pairs = np.column_stack([pixels, labels.astype(np.uint8)])
    return _sum_of_sorted(pixels), _sum_of_sorted(pairs)


def _sum_of_sorted(rows: np.ndarray) -> str:
    sums = sorted(_md5(row.tobytes()).digest() for row in rows)
    return _md5(b"".join(sums)).hexdigest()


_md5 = partial(hashlib.md5, usedforsecurity=False)


def _check_size(file: Path, size: int) -> None:
    if file.exists() and file.stat().st_size != size:
        raise _damaged(file, f"it has {file.stat().st_size} bytes in place of {size}")


def _check_archive(file: Path, md5: str) -> None:
    """An archive is read where what it holds is not there."""
    needed = file.exists() and not file.with_suffix("").exists()
    if needed and _md5(file.read_bytes()).hexdigest() != md5:
        raise _damaged(file, "its checksum is not the published one")


def _damaged(file: Path, how: str) -> RuntimeError:
    return RuntimeError(
        f"{file} is damaged: {how}. Delete it and its .gz, so that they are downloaded again, or "
        "put whole ones in their place"
    )
