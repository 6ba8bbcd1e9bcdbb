"""Every tensor is made on the network's device, without a second one at hand.

Tensors *elsewhere* are the CPU's own with a mark. They say that they are on a GPU, and what would
mix them with others is refused, as CUDA refuses it.
"""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import crcbook as crc
from crcbook.book import demos, widgets
from crcbook.datasets import split_validation
from crcbook.experiments import evaluate
from crcbook.hessian import margin_hessian
from crcbook.networks import reading
from crcbook.training import METHODS

GPU = torch.device("cuda", 0)
# What CUDA lets pass: these copy, ask, or take numbers from a tensor of any device.
FREE = {"copy_", "_has_compatible_shallow_copy_type", "new_tensor", "new_full", "new_zeros"}
STRICT = {"cat", "stack", "index_select", "gather", "scatter"}  # take no 0-d tensor of the CPU


def is_elsewhere(tensor):
    return getattr(tensor, "elsewhere", False)


def place(tensor, elsewhere=True):
    tensor.elsewhere = elsewhere
    return tensor


def names_gpu(device):
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class Elsewhere(TorchFunctionMode):
    """Keeps the marks."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        if name in ("__get__", "__set__"):
            return self.attribute(function, *args)
        if name in ("to", "cpu"):
            return self.move(function, name, *args, **kwargs)
        asked = names_gpu(kwargs.get("device"))
        if asked:
            assert kwargs.get("generator") is None, f"{name}: a generator of the CPU"
            kwargs = kwargs | {"device": "cpu"}
        self.check(name, args, kwargs)
        found = function(*args, **kwargs)
        first = args[:1] if name == "__getitem__" else tree_leaves((args, kwargs))
        if asked or (any(map(is_elsewhere, first)) and kwargs.get("device") is None):
            tree_map_only(torch.Tensor, place, found)
        return found

    def attribute(self, function, tensor, *values):
        name = function.__self__.__name__
        if name == "device" and is_elsewhere(tensor):
            return GPU
        if name == "data" and values:
            place(tensor, is_elsewhere(values[0]))
        found = function(tensor, *values)
        if is_elsewhere(tensor) and isinstance(found, torch.Tensor):
            place(found)
        return found

    def move(self, function, name, tensor, *places, **options):
        elsewhere = is_elsewhere(tensor) and name != "cpu"
        for target in (*places, options.get("device")):
            if isinstance(target, torch.Tensor):
                elsewhere = is_elsewhere(target)
            elif isinstance(target, (str, torch.device)):
                elsewhere = names_gpu(target)
        places = ["cpu" if names_gpu(target) else target for target in places]
        if names_gpu(options.get("device")):
            options["device"] = "cpu"
        moved = function(tensor, *places, **options)
        if moved is tensor and elsewhere != is_elsewhere(tensor):
            moved = tensor.detach().clone()
        return place(moved, elsewhere)

    def check(self, name, args, kwargs):
        leaves = tree_leaves((args, kwargs))
        tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
        if name in ("__getitem__", "__setitem__", "index_put"):
            whole, index, *value = args
            tensors = [whole, *(v for v in value if isinstance(v, torch.Tensor))]
            if not is_elsewhere(whole):  # a GPU's tensor takes indices of the CPU
                tensors += [i for i in tree_leaves(index) if isinstance(i, torch.Tensor)]
        marks = {is_elsewhere(t) for t in tensors if t.dim() or name in STRICT or is_elsewhere(t)}
        if len(marks) > 1 and name not in FREE:
            raise RuntimeError(f"{name} mixes devices")
        if True in marks and name in ("numpy", "__array__") and not kwargs.get("force"):
            raise TypeError("only the CPU's tensors become arrays")


@pytest.fixture
def elsewhere(digits, monkeypatch):
    """A network there, three layers deep, and the mode."""
    monkeypatch.setattr("crcbook.training.loop.knows_bfloat16", lambda device: True)
    monkeypatch.setattr(
        "crcbook.networks.reading.check_modes", lambda: None
    )  # ours changes nothing
    model = crc.mlp([64, 16, 16, 10], "softplus", seed=0)
    with Elsewhere():
        yield model.to("cuda")


def test_what_mixes_devices_is_refused(elsewhere):
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    mixtures = (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: torch.where(there > 0, there, here),
        lambda: here[there.long()],
        lambda: there.index_select(0, torch.tensor(0)),
        lambda: elsewhere(torch.ones(1, 64)),
        lambda: there.new_zeros(3) * torch.zeros_like(here),
    )
    for mixture in mixtures:
        with pytest.raises(RuntimeError, match="mixes devices"):
            mixture()
    with pytest.raises(TypeError, match="arrays"):
        there.numpy()
    assert there[here.long()].device == (there * here.sum()).device == GPU
    assert (there.cpu() + here).numpy().sum() == 6


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("curvature", ["global", "local"])
def test_certificates_are_made_on_the_networks_device(elsewhere, digits, box, curvature):
    x, y = digits.test.x[:4], digits.test.y[:4]
    for images in ((x, y), (x.to("cuda"), y.to("cuda"))):
        certificate = crc.certify(elsewhere, *images, box=box, curvature=curvature)
        assert certificate.radius.device == certificate.nearest.device == GPU
    verdict = crc.verify(elsewhere, x, y, 0.3, box=box, curvature=curvature)
    assert verdict.robust.device == GPU
    attacked = crc.attack(elsewhere, x, y, radius=0.3, box=box, restarts=2)
    assert attacked.point.device == GPU
    ball = {"x": x, "radius": 0.3, "box": box} if curvature == "local" else {}
    for bound in crc.curvature_bounds(elsewhere, y, (y + 1) % 10, **ball):
        assert bound.device == GPU


@pytest.mark.parametrize("method", ["closed-form", "lipschitz", "crown", "parabolas"])
def test_other_bounds_too(elsewhere, digits, method):
    x, y = digits.test.x[:4], digits.test.y[:4]
    assert crc.certify(elsewhere, x, y, method=method).radius.device == GPU
    assert crc.verify(elsewhere, x, y, 0.3, method=method).margin.device == GPU
    assert crc.attack(elsewhere, x, y).distance.device == GPU


@pytest.mark.parametrize("method", METHODS)
def test_trainings_too_and_their_checkpoints(elsewhere, digits, method, tmp_path):
    data, validation = digits.train.take(slice(0, 128)), digits.test.take(slice(0, 8))
    recipe = crc.Recipe(method, radius=0.3, epochs=1, batch_size=64, attack_dtype="bfloat16")
    for _ in range(2):  # the second one resumes
        crc.train(elsewhere, data, recipe, validation, tmp_path, resume=True)
    assert crc.load_model(tmp_path).to("cuda")[1].weight.device == GPU


def test_helpers_of_the_chapters_too(elsewhere, digits):
    x, y = digits.test.x[:2], digits.test.y[:2]
    assert margin_hessian(elsewhere, x, 0, 1).device == GPU
    found = demos.dual_at(elsewhere, x[0].flatten(), 0.0)
    found = [found.point, demos.spectrum_at(elsewhere, x[0], 0, 1).eigenvalues]
    found += demos.margins_in_balls(elsewhere, x[0], 0, [0.1, 0.2]).values()
    assert {type(part) for part in found} == {np.ndarray}
    assert demos.slab_radii(elsewhere, x, y, (y + 1) % 10, 2)[0].device == GPU
    plane = crc.mlp([2, 8, 2], seed=0).to("cuda")
    assert set(demos.certified_regions(plane, 0.0, 0.0, (-1, 1))) >= {
        "global",
        "local + box",
    }
    assert "<svg" in widgets.live_dual(plane, (-1, 1), (-1, 1)).children[-1].value


def test_a_default_device_changes_nothing(elsewhere, digits):
    x, y = digits.test.x[:4], digits.test.y[:4]
    recipe, part = crc.Recipe(radius=0.3, epochs=1, batch_size=64), digits.train.take(slice(0, 64))
    with torch.device("cuda"):
        assert crc.certify(elsewhere, x, y).radius.device == GPU
        assert crc.attack(elsewhere, x, y, restarts=2).distance.device == GPU
        training, validation = split_validation(part, 16)
        assert len(crc.train(elsewhere, training, recipe, validation)) == 1
        assert torch.equal(crc.load("digits").train.x.cpu(), digits.train.x)


def test_a_network_read_onto_the_cpu_is_evaluated_there(elsewhere, digits, monkeypatch):
    """As one on Apple's GPUs is, which have no float64."""
    there = reading._layer
    monkeypatch.setattr(reading, "_memory", OrderedDict())
    monkeypatch.setattr(reading, "_layer", lambda segment, _: there(segment, torch.device("cpu")))
    columns = evaluate(elsewhere, digits.test.take(slice(0, 8)), 0.3, box=True, local=True)
    assert columns["radius"].shape == (8,)


@pytest.mark.parametrize("rival", [None, "crown", "lipschitz"])
def test_an_evaluation_ends_on_the_cpu(elsewhere, digits, rival):
    part = digits.test.take(slice(0, 8))
    columns = evaluate(elsewhere, part, 0.3, box=True, local=True, rival=rival)
    assert {column.device.type for column in columns.values()} == {"cpu"}
