"""Every wrong command line is answered in one line that says what to do, before any work."""

import os
import pickle
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import write_onnx
from safetensors.torch import save_file
from torch import nn

import crcbook as crc
from crcbook.commands import main

PROGRAM = """
from torch import nn
net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
number = 3
def fails():
    raise OSError("no such weights")
class Wide(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
def relu():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
"""

HAS_ONNX, HAS_CHECKER = (find_spec(name) is not None for name in ("onnx", "flint"))


class Trap:
    """What is unpickled leaves a trace."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with what a user may have: some of it whole, most of it not."""
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 1, (6, 4)).astype(np.float32)
    y = np.arange(6) % 3

    def arrays(name, **held):
        np.savez(folder / name, **held)

    crc.save_model(folder / "net.safetensors", crc.mlp([4, 5, 3], seed=0))
    model = crc.load_model(folder / "net.safetensors")
    crc.prove(model, torch.from_numpy(x), model(torch.from_numpy(x)).argmax(1), folder / "proofs")
    if HAS_ONNX:
        write_onnx(folder / "net.onnx")
        whole = (folder / "net.onnx").read_bytes()
        (folder / "broken.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "text.onnx").write_text("a network")
    (folder / "empty.onnx").write_bytes(b"")
    cut = (folder / "net.safetensors").read_bytes()[:-10]
    (folder / "cut.safetensors").write_bytes(cut)
    save_file({"0.weight": torch.ones(3, 4)}, folder / "state.safetensors")
    torch.save(nn.Linear(4, 3).state_dict(), folder / "state.pt")
    torch.save(nn.Linear(4, 3), folder / "whole.pt")
    (folder / "program.pt2").write_bytes(b"PK")
    (folder / "net.py").write_text(PROGRAM)
    (folder / "part.py").write_text("from .net import net\n")
    torch.jit.script(nn.Linear(4, 3)).save(folder / "traced.pt")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "run.json").write_text("{}")
    (folder / "typo.py").write_text("import torch as\n")
    arrays("x.npz", x=x, y=y)
    arrays("no_x.npz", images=x, y=y)
    arrays("nothing.npz")
    arrays("no_items.npz", x=x[:0], y=y[:0])
    arrays("bytes.npz", x=(x * 255).astype(np.uint8), y=y)
    arrays("few_labels.npz", x=x, y=y[:3])
    arrays("far_labels.npz", x=x, y=y + 7)
    arrays("minus.npz", x=x, y=y - 1)
    arrays("words.npz", x=x, y=np.array(["a"] * 6))
    arrays("halves.npz", x=x, y=y + 0.5)
    arrays("wide.npz", x=np.tile(x, 2), y=y)
    arrays("flat.npz", x=x[:, 0], y=y)
    arrays("scalar.npz", x=x[0, 0])
    arrays("nan.npz", x=np.where(x > 0.5, np.nan, x), y=y)
    arrays("complex.npz", x=x.astype(complex), y=y)
    arrays("columns.npz", x=x, y=y[:, None])
    arrays("soft.npz", x=x, y=np.full((6, 3), 1 / 3))
    arrays("pickled.npz", x=np.array([Trap()], dtype=object))
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    np.save(folder / "pickled.npy", np.array([Trap()], dtype=object))
    (folder / "plain.npy").write_bytes(pickle.dumps(Trap()))
    (folder / "empty.npz").write_bytes(b"")
    data = (folder / "x.npz").read_bytes()
    (folder / "cut.npz").write_bytes(data[: len(data) // 2])
    with zipfile.ZipFile(folder / "text.npz", "w") as archive:
        archive.writestr("x.npy", "not an array")
    (folder / "table.csv").write_text("1,2,3,4\n")
    (folder / "folder.csv").mkdir()
    (folder / "run").mkdir()
    for name, facts in {"damaged": "{", "listed": "[1]", "unsaid": '{"dataset": "digits"}'}.items():
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(facts)
        crc.save_model(folder / name / "model.safetensors", crc.mlp([4, 5, 3], seed=0))
    (folder / "blocked").write_text("a file where a folder should be")
    return folder


NET = "--model net.safetensors "
GOOD = NET + "--data x.npz "
CHECK = "check proofs net.safetensors "
WRONG = [
    # Which network?
    ("certify --data x.npz", "name one network"),
    ("certify run --model net.onnx --data x.npz", "name one network"),
    (
        "certify --model missing.onnx --data x.npz",
        "missing.onnx: there is no such file; the .onnx files here: ",
    ),
    ("certify --model broken.onnx --data x.npz", "cannot read broken.onnx as an ONNX file"),
    ("certify --model text.onnx --data x.npz", "cannot read text.onnx as an ONNX file"),
    ("certify --model empty.onnx --data x.npz", "empty.onnx"),
    (
        "certify --model missing.safetensors --data x.npz",
        "missing.safetensors: there is no such file",
    ),
    ("certify --model cut.safetensors --data x.npz", "cannot read cut.safetensors"),
    ("certify --model state.safetensors --data x.npz", "give the module as well"),
    ("certify --model state.pt --data x.npz", "give the module as well"),
    ("certify --model program.pt2 --data x.npz", "load it with torch.export.load"),
    ("certify --model table.csv --data x.npz", "cannot read table.csv"),
    ("certify --model x.npz --data x.npz", "cannot read x.npz"),
    ("certify run --data x.npz", "model.safetensors"),
    ("certify nowhere --dataset digits", "cannot read nowhere"),
    ("certify --model '' --data x.npz", "must have a name"),
    (
        "certify " + GOOD + "--box 0 1 2",
        "name one network: the folder of a run, or --model FILE; got 2 and net.safetensors",
    ),
    ("certify damaged --data x.npz", "name damaged/model.safetensors, with --dataset or --data"),
    ("certify listed --data x.npz", "name listed/model.safetensors, with --dataset or --data"),
    ("certify unsaid", "name unsaid/model.safetensors, with --dataset or --data"),
    # A state dict and its module.
    ("certify --module net.py --data x.npz", "must be FILE.py:NAME"),
    ("certify --module none.py:net --data x.npz", "there is no such file"),
    ("certify --module net.py:other --data x.npz", "other in net.py is not there"),
    ("certify --module net.py:number --data x.npz", "number in net.py gives int: --module"),
    ("certify --module net.py:fails --data x.npz", "net.py: OSError: no such weights"),
    ("certify --module typo.py:net --data x.npz", "typo.py: SyntaxError"),
    ("certify --module part.py:net --data x.npz", "name a file beside the package"),
    ("certify --module net.py:Wide --data x.npz", "name a function without arguments"),
    ("certify --module net.py:net --model traced.pt --data x.npz", "a program of torch.jit"),
    ("certify --module net.py:net --model empty.pt --data x.npz", "it is empty: write it with"),
    ("certify --model net.safetensors --data far_labels.npz", "the labels of far_labels.npz"),
    ("certify --module net.py:relu --data x.npz", "relu has corners"),
    ("certify --module net.py:net --model state.pt --data x.npz", "that the file lacks"),
    (
        "certify --module net.py:net --model whole.pt --data x.npz",
        "torch.save(model.state_dict(), path)",
    ),
    ("certify --module net.py:net --model table.csv --data x.npz", "cannot load table.csv"),
    ("certify --module net.py:net --model none.pt --data x.npz", "there is no such file"),
    # Which items?
    ("certify " + NET, "give --data FILE or --dataset NAME"),
    ("certify " + GOOD + "--dataset digits", "name one source of items"),
    ("certify " + NET + "--dataset cifar", "invalid choice: 'cifar'"),
    (
        "certify " + NET + "--dataset digits",
        "digits has 64 values an item, of shape (8, 8), and the network takes 4",
    ),
    (
        "certify " + NET + "--data missing.npz",
        "cannot read missing.npz: there is no such file; the .npz files here: ",
    ),
    ("certify " + NET + "--data run", "cannot read run: it is a folder"),
    ("certify " + NET + "--data table.csv", "numpy.savez(path, x=x, y=y)"),
    ("certify " + NET + "--data empty.npz", "cannot read empty.npz"),
    ("certify " + NET + "--data cut.npz", "cannot read cut.npz"),
    ("certify " + NET + "--data text.npz", "text.npz has no array x"),
    ("certify " + NET + "--data pickled.npz", "without pickles"),
    ("certify " + NET + "--data pickled.npy", "without pickles"),
    ("certify " + NET + "--data plain.npy", "without pickles"),
    ("certify " + NET + "--data nothing.npz", "has no array x, it holds nothing"),
    ("certify " + NET + "--data no_x.npz", "has no array x, it holds images, y"),
    ("certify " + NET + "--data no_items.npz", "x in no_items.npz has no items"),
    ("certify " + NET + "--data bytes.npz", "(x / 255).astype('float32'); got uint8"),
    ("certify " + NET + "--data complex.npz", "floating-point numbers"),
    ("certify " + NET + "--data nan.npz", "x must be finite"),
    (
        "certify " + NET + "--data wide.npz",
        "wide.npz has 8 values an item, of shape (8,), and the network takes 4",
    ),
    (
        "certify " + NET + "--data flat.npz",
        "flat.npz has 1 values an item, of shape (), and the network takes 4",
    ),
    ("certify " + NET + "--data scalar.npz", "the network takes 4"),
    # Which labels?
    ("certify " + NET + "--data few_labels.npz", "there are 3 labels for 6 items"),
    ("certify " + NET + "--data far_labels.npz", "y must be in 0..2"),
    ("certify " + NET + "--data minus.npz", "y must be in 0..2"),
    ("certify " + NET + "--data words.npz", "labels must be whole numbers"),
    ("certify " + NET + "--data halves.npz", "y must hold integers"),
    ("certify " + GOOD + "--labels y.npy", "has labels y already"),
    ("certify " + NET + "--dataset digits --labels y.npy", "--labels belong to --data"),
    ("certify " + NET + "--data x.npy --labels missing.npy", "missing.npy: there is no such file"),
    ("certify " + NET + "--data x.npy --labels words.npz", "labels must be whole numbers"),
    ("certify " + NET + "--data columns.npz", "or (6, 3) one-hot rows; got (6, 1): give y[:, 0]"),
    ("certify " + NET + "--data soft.npz", "must have rows of zeros and a single one"),
    # What is asked?
    ("verify " + GOOD, "give --radius R"),
    ("verify " + GOOD + "--radius nan", "radius must be positive and finite; got nan"),
    ("verify " + GOOD + "--radius -1", "radius must be positive"),
    ("verify " + GOOD + "--radius 0", "radius must be positive"),
    ("verify " + GOOD + "--radius inf", "radius must be positive and finite"),
    ("verify " + GOOD + "--radius 1e300", "radius must be from"),
    ("verify " + GOOD + "--radius much", "a radius must be a number; got 'much'"),
    ("certify " + GOOD + "--radius", "--radius: expected at least one argument"),
    ("certify " + GOOD + "--method magic", "invalid choice: 'magic'"),
    ("certify " + GOOD + "--curvature none", "invalid choice: 'none'"),
    ("certify " + GOOD + "--targets some", "invalid choice: 'some'"),
    ("certify " + GOOD + "--method crown --curvature local", "knows neither a box nor local"),
    ("certify " + GOOD + "--box 0 0.5", "the box must hold every input"),
    ("certify " + GOOD + "--box 1 0", "lowest <= highest"),
    ("certify " + GOOD + "--box nan 1", "not NaN"),
    ("certify " + GOOD + "--box 0", "--box: expected 2 arguments"),
    ("certify " + GOOD + "--box low high", "invalid float value: 'low'"),
    ("certify " + GOOD + "--limit 0", "must be at least 1"),
    ("certify " + GOOD + "--limit -3", "must be at least 1"),
    ("certify " + GOOD + "--limit many", "must be a whole number"),
    ("certify " + GOOD + "--limit 99999999999999999999", "below 2**63"),
    # Where to?
    ("certify " + GOOD + "--rows out.txt", "--rows writes .csv or .json; got out.txt"),
    ("certify " + GOOD + "--rows .csv", "got .csv: name rows.csv, say"),
    ("certify " + GOOD + "--rows folder.csv", "cannot write folder.csv"),
    ("certify " + GOOD + "--rows blocked/out.csv", "blocked is a file, and must be a folder"),
    ("certify " + GOOD + "--rows /proc/none/out.csv", "cannot write /proc/none/out.csv"),
    ("certify " + GOOD + "--json run", "cannot write run"),
    ("certify " + GOOD + "--json blocked/out.json", "cannot write blocked/out.json"),
    ("certify " + GOOD + "--rows a.json --json a.json", "must name two files"),
    # On what?
    ("certify " + GOOD + "--device xpu", "--device xpu cannot be used"),
    ("certify " + GOOD + "--device meta", "--device cpu works everywhere"),
    ("certify " + GOOD + "--device gpu", "--device cpu works everywhere"),
    ("certify " + GOOD + "--device cuda:99", "--device cuda:99 cannot be used"),
    # The other commands, and none.
    ("", "command"),
    ("fly", "invalid choice: 'fly'"),
    ("certify " + GOOD + "--metod dual", "unrecognized arguments: --metod"),
    ("certify " + GOOD + "--cur local", "unrecognized arguments: --cur"),
    ("verify net.safetensors x.npz --radius 1", "x.npz (python -m crcbook verify --help"),
    ("prove " + GOOD + "--out p --method dual", "--method (python -m crcbook prove --help"),
    # No result is written over what is read.
    ("certify " + GOOD + "--json net.safetensors", "net.safetensors is read by this command"),
    ("certify " + GOOD + "--json ./x.npz", "x.npz is read by this command"),
    ("prove " + GOOD + "--out net.safetensors", "net.safetensors is read by this command"),
    # Nor over what someone keeps.
    ("certify " + GOOD + "--rows table.csv", "table.csv exists, and is not as this command wrote"),
    ("verify " + GOOD + "--radius 1 --rows table.csv", "name another file, or delete it"),
    ("certify " + GOOD + "--json table.csv", "table.csv exists, and is not as this command wrote"),
    ("prove " + GOOD + "--out table.csv", "table.csv exists already: name another file, or delete"),
    ("train --out somewhere", "--dataset"),
    ("train --dataset digits --out foreign", "holds a run.json of something else"),
    ("train --dataset digits --out blocked/run", "cannot write blocked/run"),
    ("train --dataset digits --out somewhere --epochs 0", "epochs must be positive"),
    ("train --dataset digits --out somewhere --width 0", "must be at least 1"),
    ("train --dataset digits --out somewhere --seed 99999999999999999999", "--seed must lie"),
    ("train --dataset digits --out somewhere --gamma 1 1.0", "--gamma names a value twice"),
    ("reproduce", "run this in the repository's folder, or name a folder"),
    ("reproduce --only mnist", "the full profile has no experiment mnist; it has mnist-2"),
    ("reproduce --profile quick --runs blocked/runs", "cannot write blocked/runs"),
    ("reproduce --profile quick --only", "--only: expected at least one argument"),
]


# What is wrong with items and labels for `certify` is so for `check`, in the same words.
WRONG += [
    (words.replace("certify " + NET, CHECK), said)
    for words, said in WRONG
    if words.startswith("certify " + NET + "--data ")
    and not {*words.split()} & {"x.npz", "--dataset"}
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_command_line_is_answered_in_one_line(words, said, files, capsys, monkeypatch):
    if ".onnx" in words and not HAS_ONNX:
        pytest.skip("ONNX files need the onnx package")
    if words.startswith("check") and not HAS_CHECKER:
        pytest.skip("the checker needs python-flint: crcbook[check]")
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    words = [word.strip("'") for word in words.split()]
    status = None
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    shown = capsys.readouterr()
    assert status in (1, 2) and shown.out == ""
    line, *rest = shown.err.splitlines()
    assert not rest and line.startswith("crcbook: ") and said in line
    left = [path for path in sorted(files.rglob("*")) if path not in before]
    assert [path for path in left if "__pycache__" not in path.parts] == []
