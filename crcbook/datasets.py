"""The data of the book: toys in the plane, bundled digits, MNIST, Fashion-MNIST and CIFAR-10.

Images are float32 with pixels in [0, 1], ``(height, width)`` or ``(colours, height, width)``;
labels are int64.
"""

import hashlib
import importlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

TOYS = ("moons", "circles", "blobs")
DATASETS = (*TOYS, "digits", "mnist", "fashion-mnist", "cifar10", "cifar10-jpeg")
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
# What `_sum_of_copies` gives of the copies of CIFAR-10 that were encoded as JPEG.
_COPIES = {
    "train": "41292a7c242f84eca3fc6e6462f4454b",
    "test": "ee9d081a9536174c4d38a49b2e492b0c",
}
_HEAD = {"images-idx3": 16, "labels-idx1": 8}  # bytes before the items
_VALUES = {"images-idx3": 784, "labels-idx1": 1}  # bytes an item


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        """A line: how many items, and of which shape."""
        return f"Split of {len(self)} items of shape {tuple(np.shape(self.x)[1:])} (fields: x, y)"

    def take(self, index: slice | Tensor) -> "Split":
        """The items at ``index``.

        Args:
            index: a slice or a tensor of positions.

        Returns:
            The chosen items.
        """
        return Split(self.x[index], self.y[index])


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        """A line: its name, how many items in its parts, of which shape, in how many classes."""
        return (
            f"Dataset {self.name}: {len(self.train)} items to train, {len(self.test)} to test, of "
            f"shape {tuple(self.train.x.shape[1:])}, in {self.classes} classes (fields: name, "
            "train, test)"
        )


def load(name: str, seed: int = 0) -> Dataset:
    """Load a dataset by name.

    MNIST, Fashion-MNIST and CIFAR-10 are read from the folder named by the environment variable
    ``CRCBOOK_DATA`` (``~/.cache/crcbook`` where it is unset) and downloaded where missing; the
    others need no network. Every image and label is held against the published ones.
    ``"cifar10-jpeg"`` is CIFAR-10 encoded again as JPEG, which is lossy: figures of it are not
    figures of CIFAR-10. It is nowhere downloaded from: its files, ``train.npz`` and ``test.npz`` in
    ``cifar10-jpeg``, hold ``jpeg``, all images' bytes, ``offsets``, where each begins and the last
    one ends, and ``labels``.

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
    if name == "cifar10":
        return _cifar10()
    if name == "cifar10-jpeg":
        return _cifar10_copies()
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
    split = _shuffled(split)  # the bundled file lists writers in turn
    return Dataset("digits", split.take(slice(0, 1297)), split.take(slice(1297, None)))


def _shuffled(split: Split) -> Split:
    """The same items in a fixed random order."""
    generator = torch.Generator().manual_seed(0)
    return split.take(torch.randperm(len(split), generator=generator, device="cpu"))


def _torchvision(name: str) -> Dataset:
    datasets, root = _module("torchvision.datasets", name), _root()
    factory = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[name]
    folder = root / factory.__name__ / "raw"
    for part, (items, *_) in _PUBLISHED[name].items():
        for kind, head in _HEAD.items():
            _check_size(folder / f"{part}-{kind}-ubyte", head + items * _VALUES[kind])
    for archive, md5 in factory.resources:
        _check_archive(folder / archive, md5)
    parts = _downloaded(factory, name, root)
    for (part, (_, *published)), read in zip(_PUBLISHED[name].items(), parts, strict=True):
        found = _sums(read.data.numpy(), read.targets.numpy())
        for kind, one, wanted in zip(_HEAD, found, published, strict=True):
            if one != wanted:
                raise _damaged(folder / f"{part}-{kind}-ubyte", f"some are not those of {name}")
    train, test = (_tensors(part.data.numpy() / 255.0, part.targets.numpy()) for part in parts)
    return Dataset(name, train, test)


def _root() -> Path:
    return Path(os.environ.get("CRCBOOK_DATA") or "~/.cache/crcbook").expanduser()


def _downloaded(factory: Callable, name: str, root: Path) -> list:
    """Both splits as torchvision reads them, after a download where they are missing."""
    try:
        return [factory(root, train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise RuntimeError(
            f"{name} is not in {root} and could not be downloaded ({error}). Set CRCBOOK_DATA to a "
            "folder that torchvision can read it from, or run once where there is a network."
        ) from error


def _cifar10() -> Dataset:
    """The original.

    Its files are pickles: torchvision holds them against the published checksums before it reads
    one.
    """
    factory = _module("torchvision.datasets", "cifar10").CIFAR10
    train, test = (
        _colours(part.data, np.asarray(part.targets))
        for part in _downloaded(factory, "cifar10", _root())
    )
    return Dataset("cifar10", train, test)


def _cifar10_copies() -> Dataset:
    pictures, folder = _module("PIL.Image", "cifar10-jpeg"), _root() / "cifar10-jpeg"
    splits = []
    for part, wanted in _COPIES.items():
        file = folder / f"{part}.npz"
        if not file.exists():
            raise RuntimeError(
                f"cifar10-jpeg needs {file}, which is nowhere downloaded from: set CRCBOOK_DATA to "
                "a folder that has it, or take cifar10, the original"
            )
        try:
            with np.load(file, allow_pickle=False) as arrays:
                jpeg, offsets, labels = (arrays[key] for key in ("jpeg", "offsets", "labels"))
            found = _sum_of_copies(jpeg, offsets, labels)
        except Exception as error:
            raise RuntimeError(f"{file} is damaged: {error}") from error
        if found != wanted:
            raise RuntimeError(f"{file} is damaged: some images are not those of cifar10-jpeg")
        images = [
            np.asarray(pictures.open(io.BytesIO(jpeg[start:stop].tobytes())).convert("RGB"))
            for start, stop in pairwise(offsets.tolist())
        ]
        splits.append(_shuffled(_colours(np.stack(images), labels)))  # they stand class by class
    return Dataset("cifar10-jpeg", *splits)


def _sum_of_copies(jpeg: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> str:
    values = jpeg.astype(np.uint8), offsets.astype(np.int64), labels.astype(np.int64)
    return _md5(b"".join(array.tobytes() for array in values)).hexdigest()


def _colours(images: np.ndarray, labels: np.ndarray) -> Split:
    """Images ``(items, height, width, 3)`` of bytes as torch has them, colours first."""
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return Split(x.float().div_(255), torch.tensor(labels, dtype=torch.int64))


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
