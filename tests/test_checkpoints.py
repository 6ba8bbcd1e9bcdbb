"""Files come back as they were written, and nothing else is taken for one."""

import os

import pytest
import torch
from conftest import Halves
from safetensors.torch import save_file
from torch import nn

import crcbook as crc
from crcbook.checkpoints import read_json, save_tensors, write_atomically, write_json
from crcbook.experiments import load_records
from crcbook.networks import read_network
from crcbook.networks.modules import row_facts


@pytest.mark.parametrize("activation", sorted(crc.ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_comes_back_bit_for_bit(tmp_path, activation, dtype):
    model = crc.mlp([5, 7, 4, 3], activation, seed=2).to(dtype)
    crc.save_model(tmp_path / "deep" / "model.safetensors", model)
    loaded = crc.load_model(tmp_path / "deep")
    assert repr(loaded) == repr(model)
    for first, second in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(first, second) and first.dtype == second.dtype


def test_any_network_comes_back_as_the_layers_it_is_read_as(tmp_path):
    path, x = tmp_path / "model.safetensors", torch.randn(5, 1, 6, 6)
    activations = (
        *(nn.Softplus(2.0, 5.0), nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.ELU(), nn.CELU(0.7)),
        *(nn.LogSigmoid(), nn.Softsign(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), crc.Arctan()),
    )
    for activation in (*activations, Halves()):
        parts = nn.BatchNorm2d(2), activation, nn.Flatten(), nn.Linear(18, 1), nn.Sigmoid()
        model = nn.Sequential(nn.Conv2d(1, 2, 2, 2), *parts).eval()
        crc.save_model(path, model, at=x)
        first, second = read_network(model, at=x), read_network(crc.load_model(path))
        for ours, theirs in zip(second.layers, first.layers, strict=True):
            assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
            assert row_facts(ours.activation) == row_facts(theirs.activation)


def test_what_a_hook_changes_is_saved(tmp_path):
    """It looks like an mlp, and is none."""
    path, model, x = tmp_path / "model", crc.mlp([3, 4, 2]).double(), torch.randn(5, 3).double()
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    crc.save_model(path, model)
    torch.testing.assert_close(crc.load_model(path)(x), model(x))


def test_what_cannot_be_read_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="relu has corners"):
        crc.save_model(tmp_path / "model", nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert not list(tmp_path.iterdir())


def test_settings_of_no_activation_are_refused(tmp_path):
    tensors = {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}
    for activation in (["relu", {}], ["tanh", {"beta": 1}], ["tanh"]):
        save_tensors(tmp_path / "model", tensors, {"activations": [activation]})
        with pytest.raises(RuntimeError, match="holds no crcbook model"):
            crc.load_model(tmp_path / "model")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(RuntimeError, match="cannot read"):
        crc.load_model(path)
    path.write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match="cannot read"):
        crc.load_model(path)
    crc.save_model(path, crc.mlp([3, 4, 2]))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RuntimeError, match="cannot read"):
        crc.load_model(path)


def test_a_file_without_weights_is_no_model(tmp_path):
    save_tensors(tmp_path / "empty", {}, {"sizes": [3, 2], "activation": "softplus"})
    with pytest.raises(RuntimeError, match="holds no crcbook model"):
        crc.load_model(tmp_path / "empty")


def test_facts_come_back_and_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"epochs": [1, 2], "rival": None})
    assert read_json(path) == {"epochs": [1, 2], "rival": None}
    for damaged in ('{"epochs": [1,', "17"):
        path.write_text(damaged)
        with pytest.raises(RuntimeError, match="cannot read .*run.json"):
            read_json(path)
    with pytest.raises(RuntimeError, match="cannot read .*run.json"):
        load_records(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_atomically(path, b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(RuntimeError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match="cannot write"):
        crc.save_model(tmp_path / "file" / "model.safetensors", crc.mlp([3, 2]))


CHECKPOINTS = {
    "averaged": lambda state: {
        "n_averaged": torch.tensor(3),
        **{f"module.{name}": held for name, held in state.items()},
    },
    "pt": lambda state: state,
    "checkpoint": lambda state: {"epoch": 3, "state_dict": state, "rng": torch.get_rng_state()},
    "another key": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    **{
        prefix: lambda state, prefix=prefix: {prefix + name: state[name] for name in state}
        for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod.")
    },
    "both": lambda state: {"net": {f"module.{name}": state[name] for name in state}, "epoch": 3},
}


@pytest.mark.parametrize("kind", ["safetensors", *CHECKPOINTS])
def test_a_state_dict_is_read_into_its_module(tmp_path, kind):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten())

    model = build(0)
    model(torch.randn(9, 1, 4, 4))  # moves the running statistics
    state, path = model.state_dict(), tmp_path / "state.pth"
    if kind == "safetensors":
        path = tmp_path / "state.safetensors"
        save_file(state, path)
    else:
        torch.save(CHECKPOINTS[kind](state), path)
    loaded, x = crc.load_model(path, build(1)), torch.randn(3, 1, 4, 4)
    assert not loaded.training and torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"weight": torch.ones(2, 3)}, "ema": {"weight": torch.ones(2, 3)}},
         r"several state dicts, model, ema: .*torch\.save\(checkpoint\['model'\]"),
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3}, "the module has weight, bias that the file lacks, and the file epoch that"),
    ],
)  # fmt: skip
def test_what_is_no_single_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(RuntimeError, match=message):
        crc.load_model(tmp_path / "state.pt", nn.Linear(3, 2))


def test_a_program_is_saved_as_the_layers_it_is_read_as(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    crc.save_model(tmp_path / "net.safetensors", torch.export.export(model, (x[:1],)))
    torch.testing.assert_close(
        crc.load_model(tmp_path / "net.safetensors")(x.double()).float(), model(x)
    )


def test_code_in_a_state_dict_is_not_run(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "state.pt"
    torch.save({"weight": torch.ones(2, 3), "bias": Trap()}, path)
    with pytest.raises(RuntimeError, match="holds more than tensors"):
        crc.load_model(path, nn.Linear(3, 2))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("net.pt", "load_model\\(path, module\\)"),
        ("net.safetensors", "load_model\\(path, module\\)"),
        ("net.pt2", "torch.export.load"),
    ],
)
def test_what_a_file_does_not_say_is_asked_for(tmp_path, name, said):
    state = nn.Linear(3, 2).state_dict()
    if name == "net.safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    with pytest.raises(RuntimeError, match=said):
        crc.load_model(tmp_path / name)
    with pytest.raises(RuntimeError, match=r"weight is of shape \(2, 3\) in the file and \(2, 4\)"):
        crc.load_model(tmp_path / name, nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"as Linear\(\) makes one"):
        crc.load_model(tmp_path / name, nn.Linear)


def test_a_file_is_named_as_what_it_is(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for name in ("net.onnx", "net.pt", "net.PTH", "net.pt2"):
        with pytest.raises(ValueError, match="save_model writes safetensors"):
            crc.save_model(tmp_path / name, model)
    with pytest.raises(TypeError, match="the path first"):
        crc.save_model(model, tmp_path / "net.safetensors")
    (tmp_path / "net.ONNX").write_bytes(b"")
    with pytest.raises(ValueError, match="load it without a module"):
        crc.load_model(tmp_path / "net.ONNX", model)


def test_tied_layers_are_saved(tmp_path):
    tied = nn.Linear(8, 8)
    layers = nn.Linear(6, 8), nn.Tanh(), tied, nn.Tanh(), tied, nn.Tanh(), nn.Linear(8, 3)
    model, x = nn.Sequential(nn.Flatten(), *layers).eval(), torch.rand(4, 6)
    crc.save_model(tmp_path / "tied.safetensors", model)
    found = crc.load_model(tmp_path / "tied.safetensors")
    torch.testing.assert_close(found(x), model(x), rtol=1e-6, atol=1e-6)
