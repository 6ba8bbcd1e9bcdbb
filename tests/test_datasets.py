"""Data comes in the promised form, and its absence is explained."""

import gzip
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import crcbook as crc
from crcbook.datasets import TOYS


@pytest.mark.parametrize("name", [*TOYS, "digits"])
def test_bundled_data_have_the_promised_form(name):
    data = crc.load(name)
    for split in (data.train, data.test):
        assert split.x.dtype == torch.float32 and split.y.dtype == torch.int64
        assert len(split) == len(split.x) == len(split.y) > 100
        assert set(split.y.tolist()) == set(range(data.classes))
        assert split.x[0].numel() == data.inputs
    again, other = crc.load(name), crc.load(name, seed=1)
    assert torch.equal(data.train.x, again.train.x)
    assert torch.equal(data.train.x, other.train.x) == (name == "digits")  # a seed is the toys'
    seen = {tuple(item) for item in data.train.x.flatten(1).tolist()}
    assert not any(tuple(item) in seen for item in data.test.x.flatten(1).tolist())


def test_digits_are_images_in_an_order_of_their_own():
    data, listed = crc.load("digits"), torch.tensor(load_digits().target)
    assert not torch.equal(data.train.y, listed[:1297])
    assert torch.equal(torch.cat([data.train.y, data.test.y]).sort()[0], listed.sort()[0])
    assert data.train.x.shape == (1297, 8, 8) and data.test.x.shape == (500, 8, 8)
    assert data.train.x.min() >= 0 and data.train.x.max() == 1


def test_validation_is_disjoint_and_reproducible():
    data = crc.load("moons")
    training, validation = crc.split_validation(data.train, 50, seed=1)
    assert (len(training), len(validation)) == (350, 50)
    rows = {tuple(row) for row in training.x.tolist()}
    assert not rows & {tuple(row) for row in validation.x.tolist()}
    assert torch.equal(validation.x, crc.split_validation(data.train, 50, seed=1)[1].x)
    with pytest.raises(ValueError, match="items must be between 1 and 399"):
        crc.split_validation(data.train, 400)


def write_idx(path, array):
    """Write the format of the MNIST files."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_images_are_read_from_the_named_folder(tmp_path, monkeypatch, name, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, items in [("train", 30), ("t10k", 20)]:
        images = generator.integers(0, 256, (items, 28, 28), dtype=np.uint8)
        images[0, 0, 0] = 255
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(items, dtype=np.uint8) % 10)
    monkeypatch.setenv("CRCBOOK_DATA", str(tmp_path))
    data = crc.load(name)
    assert data.train.x.shape == (30, 28, 28) and data.test.x.shape == (20, 28, 28)
    assert data.train.x.max() == 1 and data.train.x.dtype == torch.float32
    assert (data.inputs, data.classes) == (784, 10)


def test_missing_images_without_a_network_are_explained(tmp_path, monkeypatch):
    def no_network(self):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", no_network)
    monkeypatch.setenv("CRCBOOK_DATA", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no route to host.*Set CRCBOOK_DATA"):
        crc.load("mnist")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="dataset must be one of"):
        crc.load("cifar")
