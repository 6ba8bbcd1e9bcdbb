"""Data comes in the promised form, and its absence is explained."""

import gzip
import hashlib
import io
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import crcbook as crc
from crcbook import datasets
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


def test_data_are_shown_in_a_line():
    data = crc.load("digits")
    assert repr(data) == (
        "Dataset digits: 1297 items to train, 500 to test, of shape (8, 8), in 10 classes "
        "(fields: name, train, test)"
    )
    assert repr(data.test) == "Split of 500 items of shape (8, 8) (fields: x, y)"


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


def write_images(root, monkeypatch, name="mnist", folder="MNIST"):
    """A folder as torchvision keeps it, with few random images, which count as published."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    generator, published = np.random.default_rng(0), {}
    for part, items in [("train", 30), ("t10k", 20)]:
        images = generator.integers(0, 256, (items, 28, 28), dtype=np.uint8)
        images[0, 0, 0] = 255
        labels = np.arange(items, dtype=np.uint8) % 10
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
        published[part] = (items, *datasets._sums(images, labels))
    monkeypatch.setitem(datasets._PUBLISHED, name, published)
    monkeypatch.setenv("CRCBOOK_DATA", str(root))
    return raw


FOLDERS = [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]


@pytest.mark.parametrize(("name", "folder"), FOLDERS)
def test_images_are_read_from_the_named_folder(tmp_path, monkeypatch, name, folder):
    write_images(tmp_path, monkeypatch, name, folder)
    data = crc.load(name)
    assert data.train.x.shape == (30, 28, 28) and data.test.x.shape == (20, 28, 28)
    assert data.train.x.max() == 1 and data.train.x.dtype == torch.float32
    assert (data.inputs, data.classes) == (784, 10)


def zeroed(content):
    return content[:5000] + bytes(784) + content[5784:]


def labels_moved(content):
    return content[:8] + content[9:] + content[8:9]


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("train-images-idx3-ubyte", zeroed, "some are not those of mnist"),
        ("t10k-images-idx3-ubyte", zeroed, "some are not those of mnist"),
        ("t10k-images-idx3-ubyte", lambda c: c[:-1], "it has 15695 bytes in place of 15696"),
        ("train-labels-idx1-ubyte", lambda c: c[:23], "it has 23 bytes in place of 38"),
        ("train-labels-idx1-ubyte", lambda c: b"", "it has 0 bytes in place of 38"),
        ("train-labels-idx1-ubyte", labels_moved, "some are not those of mnist"),
        ("t10k-labels-idx1-ubyte", lambda c: c[:-1] + b"\x01", "some are not those of mnist"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, monkeypatch, name, damage, said):
    path = write_images(tmp_path, monkeypatch) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RuntimeError) as error:
        crc.load("mnist")
    assert f"{path} is damaged: {said}. Delete it" in str(error.value)


def test_a_damaged_archive_is_named_where_it_would_be_read(tmp_path, monkeypatch):
    raw = write_images(tmp_path, monkeypatch)
    crc.load("mnist")  # the archives here are not the published ones, and nobody reads them
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(RuntimeError, match="t10k-labels-idx1-ubyte.gz is damaged: its checksum"):
        crc.load("mnist")


def test_copies_may_hold_the_items_in_another_order(tmp_path, monkeypatch):
    raw = write_images(tmp_path, monkeypatch)
    for name, head, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
        path = raw / f"train-{name}-ubyte"
        content = path.read_bytes()
        path.write_bytes(content[:head] + content[head + size :] + content[head : head + size])
    assert crc.load("mnist").train.y[-1] == 0


def test_missing_images_without_a_network_are_explained(tmp_path, monkeypatch):
    def no_network(self):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", no_network)
    monkeypatch.setenv("CRCBOOK_DATA", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no route to host.*Set CRCBOOK_DATA"):
        crc.load("mnist")


def write_cifar10(root, monkeypatch):
    """A folder as torchvision keeps it, with few random images, which count as published."""
    folder, generator = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    sums = {}
    for name, items in [("data_batch_1", 30), ("test_batch", 20), ("batches.meta", 0)]:
        data = generator.integers(0, 256, (items, 3072), dtype=np.uint8)
        facts = {"data": data, "labels": [i % 10 for i in range(items)], "label_names": ["a"] * 10}
        (folder / name).write_bytes(pickle.dumps(facts))
        sums[name] = [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
    factory = torchvision.datasets.CIFAR10
    monkeypatch.setattr(factory, "train_list", [sums["data_batch_1"]])
    monkeypatch.setattr(factory, "test_list", [sums["test_batch"]])
    monkeypatch.setattr(factory, "meta",
                        factory.meta | {"md5": sums["batches.meta"][1]})  # fmt: skip
    monkeypatch.setenv("CRCBOOK_DATA", str(root))
    return folder


def test_colours_stand_first(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path, monkeypatch)
    data = crc.load("cifar10")
    assert data.train.x.shape == (30, 3, 32, 32) and data.test.x.shape == (20, 3, 32, 32)
    assert (data.inputs, data.classes, data.train.x.dtype) == (3072, 10, torch.float32)
    raw = pickle.loads((folder / "test_batch").read_bytes())["data"]  # written above
    expected = torch.tensor(raw).reshape(20, 3, 32, 32) / 255
    torch.testing.assert_close(data.test.x, expected)

    def no_network(self):
        if not self._check_integrity():
            raise RuntimeError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_network)
    (folder / "test_batch").write_bytes(bytes(5))
    with pytest.raises(RuntimeError, match=r"cifar10 .*no route to host.*Set CRCBOOK_DATA"):
        crc.load("cifar10")


def write_copies(root, monkeypatch):
    """CIFAR-10 as JPEG: few images of one colour each, which count as the copies."""
    folder = root / "cifar10-jpeg"
    folder.mkdir()
    for part, items in [("train", 30), ("test", 20)]:
        files = []
        for i in range(items):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (8 * i, 100, 0)).save(file, "jpeg", quality=95)
            files.append(file.getvalue())
        arrays = {
            "jpeg": np.frombuffer(b"".join(files), np.uint8),
            "offsets": np.cumsum([0, *map(len, files)]),
            "labels": np.arange(items, dtype=np.uint8) // (items // 10),
        }
        np.savez(folder / f"{part}.npz", **arrays)
        monkeypatch.setitem(datasets._COPIES, part, datasets._sum_of_copies(**arrays))
    monkeypatch.setenv("CRCBOOK_DATA", str(root))
    return folder


def test_copies_of_colour_images_are_a_dataset_of_their_own(tmp_path, monkeypatch):
    folder = write_copies(tmp_path, monkeypatch)
    data = crc.load("cifar10-jpeg")
    assert data.train.x.shape == (30, 3, 32, 32) and data.test.x.shape == (20, 3, 32, 32)
    assert data.name == "cifar10-jpeg" and data.train.y.tolist() != sorted(data.train.y.tolist())
    red, green = data.train.x[:, :2].flatten(2).mean(2).T * 255
    assert ((red / 8).round().long() // 3).tolist() == data.train.y.tolist()  # three a class
    assert (green - 100).abs().max() < 3
    with np.load(folder / "test.npz") as arrays:
        changed = dict(arrays) | {"labels": arrays["labels"][::-1]}
    np.savez(folder / "test.npz", **changed)
    with pytest.raises(RuntimeError, match=r"test\.npz is damaged: some images are not those"):
        crc.load("cifar10-jpeg")
    (folder / "test.npz").write_bytes(b"no arrays")
    with pytest.raises(RuntimeError, match=r"test\.npz is damaged"):
        crc.load("cifar10-jpeg")
    (folder / "test.npz").unlink()
    with pytest.raises(RuntimeError, match=r"nowhere downloaded from.*take cifar10, the original"):
        crc.load("cifar10-jpeg")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="dataset must be one of"):
        crc.load("cifar")
