"""The command line, as a newcomer uses it."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_onnx
from torch import nn

import crcbook as crc
from crcbook.commands import main, parser
from crcbook.experiments import Experiment
from crcbook.training import METHODS, loop

ROOT = Path(__file__).parents[1]
TRAIN = ["train", "--dataset", "digits", "--width", "24", "--epochs", "3", "--batch-size", "64",
         "--radius", "0.4", "--gamma", "0.02", "--device", "cpu"]  # fmt: skip


def test_train_then_certify(tmp_path, capsys):
    run, figures = tmp_path / "run", tmp_path / "out.json"
    assert main([*TRAIN, "--out", str(run)]) == 0
    assert "kept epoch" in capsys.readouterr().out
    facts = json.loads((run / "run.json").read_text())
    assert facts["recipe"]["gamma"] == 0.02 and len(facts["history"]) == 3
    words = [str(run), "--limit", "100", "--json", str(figures), "--device", "cpu"]
    assert main(["certify", *words, "--box", "0", "1"]) == 0
    assert "certified_accuracy at 0.4" in capsys.readouterr().out
    out = json.loads(figures.read_text())
    # The run knows what it was trained on and for; the file knows how it was made.
    assert out["dataset"] == "digits" and out["radius"] == [0.4]
    assert out["model"] == str(run) and out["box"] == [0, 1] and out["curvature"] == "global"
    assert out["environment"]["torch"] == torch.__version__
    assert out["items"] == 100 and 0.5 < out["accuracy"] <= 1
    assert 0 < out["certified_accuracy"]["0.4"] < out["accuracy"]
    assert out["mean_radius"] > 0 and 0 < out["exact_fraction"] <= 1 and out["seconds"] > 0
    assert main(["verify", *words[:-4], "--json", str(tmp_path / "verdicts.json")]) == 0
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    shares = [verdicts[name]["0.4"] for name in ("robust", "undecided", "adversarial")]
    assert 0 < shares[0] <= out["certified_accuracy"]["0.4"]  # no box to help
    assert abs(sum(shares) - out["accuracy"]) < 1e-9


def test_a_finished_run_is_not_overwritten(tmp_path, capsys):
    words = [*TRAIN, "--out", str(tmp_path)]
    assert main(words) == 0
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert main([*words, "--epochs", "1"]) == 1
    assert "holds a finished run" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert main([*words, "--resume"]) == 0


@pytest.mark.parametrize("gammas", [["0.02"], ["0.02", "0.5"]])
def test_an_interrupted_run_is_resumed_and_not_overwritten(tmp_path, capsys, monkeypatch, gammas):
    words = [*TRAIN, "--gamma", *gammas, "--out", str(tmp_path / "run")]
    epochs, epoch = [], loop._Trainer.epoch

    def interrupted(self, number, bar):
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(number)
        epoch(self, number, bar)

    monkeypatch.setattr(loop._Trainer, "epoch", interrupted)
    assert main(words) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "crcbook: interrupted; --resume goes on from the last epoch"
    epochs.append("later")
    assert main(words) == 1
    assert "holds an unfinished run: --resume it" in capsys.readouterr().err
    assert main([*words, "--resume", "--activation", "tanh"]) == 1
    assert "its model activation differs" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert epochs == [0, 1, "later", *([2], [2, 0, 1, 2])[len(gammas) - 1]]


def test_certify_looks_at_local_curvature_where_asked(tmp_path, bent_model):
    model = tmp_path / "model.safetensors"
    crc.save_model(model, bent_model)
    words = ["certify", str(model), "--dataset", "digits", "--radius", "0.3", "--limit", "60",
             "--device", "cpu"]  # fmt: skip
    certified = []
    for curvature in ("global", "local"):
        figures = tmp_path / f"{curvature}.json"
        options = ["--method", "dual", "--curvature", curvature, "--json", str(figures)]
        assert main([*words, *options]) == 0
        out = json.loads(figures.read_text())
        assert out["curvature"] == curvature
        certified.append(out["certified_accuracy"]["0.3"])
    assert certified[0] < certified[1]


def test_a_device_that_torch_was_not_built_for_is_named(tmp_path, capsys):
    assert main(["certify", str(tmp_path), "--device", "xpu"]) == 1
    assert "--device xpu cannot be used" in capsys.readouterr().err


def test_a_damaged_run_is_named(tmp_path, capsys):
    crc.save_model(tmp_path / "model.safetensors", crc.mlp([64, 8, 10]))
    (tmp_path / "run.json").write_text("{")
    assert main(["certify", str(tmp_path), "--device", "cpu"]) == 1
    assert f"cannot read {tmp_path / 'run.json'}" in capsys.readouterr().err


def test_quick_records_lie_below_the_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = crc.Recipe(radius=0.1, epochs=1)
    tiny = Experiment("digits", 2, "softplus", recipe, width=8, box=False)
    monkeypatch.setattr("crcbook.commands.reproduce.experiments", lambda profile: {"tiny": tiny})
    assert main(["reproduce", "--profile", "quick", "--runs", "mine", "--device", "cpu"]) == 0
    assert Path("mine", "results", "tiny.json").exists()
    assert capsys.readouterr().out.rstrip().endswith(f"new {Path('mine', 'results', 'tiny.json')}")


def test_the_help_explains_a_recipe_even_without_docstrings(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "more than a few can be unstable" in " ".join(capsys.readouterr().out.split())
    for nothing in (None, "Recipe(method: str = 'crt')"):
        monkeypatch.setattr(crc.Recipe, "__doc__", nothing)
        with pytest.raises(SystemExit, match="0"):
            main(["train", "--help"])


def test_a_network_is_certified_on_data_of_its_size(tmp_path, capsys):
    model = tmp_path / "model.safetensors"
    crc.save_model(model, crc.mlp([64, 8, 10]))
    words = ["certify", str(model), "--limit", "5", "--device", "cpu"]
    assert main(words) == 1
    assert "does not say what it was trained on" in capsys.readouterr().err
    assert main([*words, "--dataset", "moons", "--radius", "0.1"]) == 1
    said = capsys.readouterr().err
    assert "moons has 2 values an item, of shape (2,), and the network takes 64" in said


def test_of_several_gammas_validation_keeps_one(tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*TRAIN, "--gamma", "0.5", "0.01", "0.50", "--out", str(run)]) == 1
    assert "--gamma names a value twice" in capsys.readouterr().err and not run.exists()
    assert main([*TRAIN, "--gamma", "0.01", "0.5", "--out", str(run)]) == 0
    facts = json.loads((run / "run.json").read_text())
    certified = [candidate["certified_accuracy"] for candidate in facts["candidates"]]
    assert len(certified) == 2 and facts["validation"]["certified_accuracy"] == max(certified)
    weights = (run / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*TRAIN, "--gamma", "0.01", "--out", str(run), "--resume"]) == 1
    assert "another number of --gamma values" in capsys.readouterr().err
    assert (run / "model.safetensors").read_bytes() == weights


def test_every_option_of_a_recipe_is_one_of_train(tmp_path):
    run = tmp_path / "run"
    other = crc.Recipe(
        "adversarial", radius=0.3, reach=1.2, gamma=0.5, epochs=2, batch_size=50,
        learning_rate=1e-3, ramp_epochs=1.5, average=0.9, attack_steps=3, attack_box=True,
        attack_dtype="bfloat16", augment=True, mirror=True, centred=True, curvature="local",
        ball=0.75, curvature_every=2, loss_q=0.3, validate_every=2, seed=3,
    )  # fmt: skip
    words = ["train", "--dataset", "digits", "--width", "16", "--device", "cpu", "--out", str(run)]
    for name, value in asdict(other).items():
        assert value != getattr(crc.Recipe(), name), f"nothing is tested of {name}"
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    assert main(words) == 0
    assert json.loads((run / "run.json").read_text())["recipe"] == asdict(other)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--average", "much"], "--average: invalid float value: 'much'"),
        (["--curvature", "none"], "--curvature: invalid choice: 'none' (choose from"),
        (["--epochs", "1.5"], "--epochs: invalid int value: '1.5'"),
        (["--gama", "1"], "unrecognized arguments: --gama"),
    ],
)
def test_mistyped_options_are_named(words, wanted, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*TRAIN, "--out", "unused", *words])
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["reproduce", "--only", "mnist"],
            "the full profile has no experiment mnist; it has mnist-2",
        ),
        (["certify", "nowhere", "--dataset", "digits"], "cannot read nowhere"),
        ([*TRAIN, "--out", "/dev/null/run"], "cannot write"),
        ([*TRAIN, "--out", "unused", "--radius", "-1"], "radius must be positive"),
        ([*TRAIN, "--out", "unused", "--average", "1"], "average must be at least 0 and below 1"),
    ],
)
def test_mistakes_are_explained_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("crcbook: ") and message in error


def test_python_dash_m_shows_its_commands():
    shown = subprocess.run(
        [sys.executable, "-m", "crcbook", "--help"], capture_output=True, text=True, check=True
    )
    assert "train" in shown.stdout and "certify" in shown.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "crcbook", "train", "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert f"{{{','.join(METHODS)}}}" in shown.stdout
    wrong = subprocess.run([sys.executable, "-m", "crcbook", "fly"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "invalid choice" in wrong.stderr


@pytest.mark.parametrize(
    ("gpus", "rank", "device"),
    [(0, None, "cpu"), (1, None, "cuda:0"), (4, "3", "cuda:3"), (2, "3", "cuda:1")],
)
def test_each_process_takes_its_own_gpu(gpus, rank, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert parser().parse_args(["reproduce"]).device == device


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a network and items of one's own, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    model, x = crc.mlp([4, 8, 3], "tanh", seed=0), torch.rand(250, 4, generator=generator)
    y = model(x).argmax(1)
    y[::10] = (y[::10] + 1) % 3  # misclassified
    crc.save_model("net.safetensors", model)
    np.savez("items.npz", x=x.numpy(), y=y.numpy().astype(np.uint8))
    np.save("x.npy", x.numpy())
    np.save("y.npy", y.numpy())
    return model, x, y


CERTIFY = "certify --model net.safetensors --data items.npz --device cpu"


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_certify_writes_a_row_an_item(own, capsys):
    model, x, y = own
    words = [*CERTIFY.split(), "--method", "dual", "--box", "0", "1"]
    assert main([*words, "--rows", "out.csv", "--radius", "0.1", "0.3"]) == 0
    shown = capsys.readouterr().out
    wanted = crc.certify(model, x, y, box=(0.0, 1.0), method="dual")
    rows = table("out.csv")
    assert [int(row["index"]) for row in rows] == list(range(250))
    assert [int(row["label"]) for row in rows] == y.tolist()
    assert [int(row["answer"]) for row in rows] == model(x).argmax(1).tolist()
    radius = torch.tensor([float(row["radius"]) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(radius, wanted.radius, rtol=1e-6, atol=0)
    assert [int(row["target"]) for row in rows] == wanted.target.tolist()
    assert {row["method"] for row in rows} == {"dual"}
    assert [row["exact"] == "True" for row in rows] == wanted.exact.tolist()
    distance = torch.tensor([float(row["distance"]) for row in rows], dtype=torch.float64)
    assert (radius <= distance).all() and distance.isfinite().any()
    for at in (0.1, 0.3):
        share = (radius >= at).double().mean().item()
        assert re.search(rf"certified_accuracy at {at} +{share:g}\n", shown)
    assert main([*words, "--rows", "out.json", "--limit", "7"]) == 0
    listed = json.loads(Path("out.json").read_text())
    assert [float(row["radius"]) for row in listed] == pytest.approx(radius[:7].tolist())
    assert sorted(path.name for path in Path().glob("out*")) == [
        "out.csv", "out.json",
    ]  # fmt: skip


def test_without_labels_the_answer_is_certified(own):
    model, x, y = own
    words = [
        "certify",
        "--model",
        "net.safetensors",
        "--data",
        "x.npy",
        "--device",
        "cpu",
    ]
    assert main([*words, "--rows", "out.csv", "--json", "out.json"]) == 0
    assert [int(row["label"]) for row in table("out.csv")] == model(x).argmax(1).tolist()
    assert json.loads(Path("out.json").read_text())["accuracy"] is None
    words += ["--labels", "y.npy", "--rows", "labelled.csv", "--json", "labelled.json"]
    assert main(words) == 0
    assert [int(row["label"]) for row in table("labelled.csv")] == y.tolist()
    assert json.loads(Path("labelled.json").read_text())["accuracy"] == 0.9


def test_verify_says_what_holds_at_each_radius(own):
    model, x, y = own
    words = [
        "verify",
        "--model",
        "net.safetensors",
        "--data",
        "items.npz",
        "--device",
        "cpu",
        "--rows",
        "out.csv",
    ]
    assert main([*words, "--method", "dual", "--radius", "0.05", "0.5"]) == 0
    rows = table("out.csv")
    assert len(rows) == 500
    for radius in (0.05, 0.5):
        mine = [row for row in rows if float(row["radius"]) == radius]
        assert [int(row["index"]) for row in mine] == list(range(250))
        robust = crc.verify(model, x, y, radius=radius, method="dual").robust.tolist()
        assert [row["verdict"] == "robust" for row in mine] == robust
        wrong = (model(x).argmax(1) != y).tolist()
        assert [row["verdict"] == "misclassified" for row in mine] == wrong
        assert [float(row["margin"]) > 0 for row in mine] == robust
    assert {row["verdict"] for row in rows} >= {"robust", "adversarial", "misclassified"}


def test_a_network_in_an_onnx_file_or_beside_its_state_is_certified(own):
    model, x, y = own
    torch.save(model.state_dict(), "state.pt")
    Path("sizes.py").write_text("WIDTH = 8\n")
    Path("net.py").write_text(
        "import crcbook as crc\nfrom sizes import WIDTH\n"
        "def build():\n    return crc.mlp([4, WIDTH, 3], 'tanh', seed=5)\n"
    )
    words = "certify --model state.pt --module net.py:build --data items.npz --device cpu"
    assert main([*words.split(), "--rows", "state.csv"]) == 0
    assert main([*CERTIFY.split(), "--rows", "plain.csv"]) == 0
    assert Path("state.csv").read_text() == Path("plain.csv").read_text()
    write_onnx("net.onnx")
    words = "certify --model net.onnx --data items.npz --device cpu --rows onnx.csv"
    assert main(words.split()) == 0
    assert len(table("onnx.csv")) == 250


def test_rows_of_a_network_in_code_are_not_taken_for_those_of_another(own, capsys):
    """The same weights, in a module of another activation."""
    model, _, _ = own
    torch.save(model.state_dict(), "state.pt")
    text = "import crcbook as crc\ndef {}():\n    return crc.mlp([4, 8, 3], '{}')\n"
    Path("net.py").write_text(text.format("first", "tanh") + text.format("second", "sigmoid"))
    asked = "certify --model state.pt --data items.npz --device cpu --rows out.csv"
    words = [*asked.split(), "--module"]
    assert main([*words, "net.py:first"]) == 0
    held = Path("out.csv").read_bytes()
    capsys.readouterr()
    assert main([*words, "net.py:second"]) == 1
    assert "model" in capsys.readouterr().err and Path("out.csv").read_bytes() == held
    Path("net.py").write_text(text.format("first", "silu"))
    assert main([*words, "net.py:first"]) == 1
    assert "model" in capsys.readouterr().err and Path("out.csv").read_bytes() == held


def interrupt(monkeypatch, after):
    """Make a Ctrl-C come after some calls of ``certify``; returns the calls' items."""
    calls = []

    def certify(model, x, y, **options):
        if len(calls) == after:
            raise KeyboardInterrupt
        if len(x) > 1:  # not the trial
            calls.append(len(x))
        return crc.certify(model, x, y, **options)

    monkeypatch.setattr("crcbook.commands.certify.certify", certify)
    return calls


def test_an_interrupted_certification_goes_on(own, capsys, monkeypatch):
    words = [*CERTIFY.split(), "--rows", "out.csv"]
    assert main([*CERTIFY.split(), "--rows", "whole.csv"]) == 0
    calls = interrupt(monkeypatch, 4)
    assert main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "crcbook: interrupted; the same command goes on from out.csv.part"
    )
    assert calls == [20] * 4 and not Path("out.csv").exists()
    with open("out.csv.part", "a") as file:
        file.write('{"items": 20, "seconds": 1.0, "ro')  # a machine that stopped as it wrote
    calls = interrupt(monkeypatch, 99)
    assert main(words) == 0
    assert calls == [20] * 8 + [10]
    assert Path("out.csv").read_text() == Path("whole.csv").read_text()
    assert not Path("out.csv.part").exists()


def test_rows_of_another_question_are_not_gone_on_with(own, capsys, monkeypatch):
    words = [*CERTIFY.split(), "--method", "dual", "--rows", "out.csv"]
    interrupt(monkeypatch, 1)
    assert main(words) == 130
    kept = Path("out.csv.part").read_text()
    model, x, y = own
    interrupt(monkeypatch, 9)
    for more, differs in (
        (["--method", "crown"], "method"),
        (["--box", "0", "1"], "box"),
        (["--limit", "120"], "data"),
    ):
        assert main([*words, *more]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"its {differs} differs" in error and "delete it" in error
    np.savez("items.npz", x=x.numpy(), y=(y.numpy() + 1) % 3)
    assert main(words) == 1 and "its data differs" in capsys.readouterr().err
    np.savez("items.npz", x=x.numpy(), y=y.numpy())
    with torch.no_grad():
        model[1].bias += 1e-3
    crc.save_model("net.safetensors", model)
    assert main(words) == 1 and "its model differs" in capsys.readouterr().err
    monkeypatch.setattr("crcbook.commands.rows.digest", lambda paths: "other code")
    assert main(words) == 1 and "its model, program differs" in capsys.readouterr().err
    assert Path("out.csv.part").read_text() == kept
    Path("out.csv.part").write_text("no rows\n")
    assert main(words) == 1 and "delete it to begin anew" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("command", ["certify", "verify"])
def test_a_finished_file_is_found_again_and_kept_from_other_questions(
    own, capsys, monkeypatch, command, suffix
):
    model, x, y = own
    file, summary = Path(f"out.{suffix}"), Path("summary.json")
    words = [*CERTIFY.split(), "--rows", str(file), "--json", str(summary), "--method", "dual"]
    words = [command, *words[1:], "--radius", "0.1"]
    assert main(words) == 0
    first, shown = file.read_bytes(), capsys.readouterr().out
    assert f"wrote {file}" in shown

    def again(model, x, *_, **options):
        assert len(x) == 1, "what is known was asked again"  # the trial, which takes no work
        return getattr(crc, command)(model, x, *_, **options)

    monkeypatch.setattr(f"crcbook.commands.{command}.{command}", again)
    assert main(words) == 0
    assert capsys.readouterr().out == shown.replace(f"wrote {file}", f"found {file}")
    assert file.read_bytes() == first
    np.savez("other.npz", x=x.numpy()[::-1], y=y.numpy()[::-1])
    crc.save_model("other.safetensors", crc.mlp([4, 8, 3], "tanh", seed=1))
    old = summary.read_bytes()
    for place, kept in (("--rows", file), ("--json", summary)):
        asked = [*words[: words.index("--rows")], *words[words.index("--method") :]]
        for more, differs in (
            (["--method", "crown"], "method"),
            (["--box", "0", "1"], "box"),
            (["--data", "other.npz"], "data" if place == "--rows" else "sha256"),
            (["--model", "other.safetensors"], "model" if place == "--rows" else "sha256"),
            (["--radius", "0.2"], "radius"),
        ):
            if command == "certify" and place == "--rows" and differs == "radius":
                continue  # its rows are the same for every radius
            assert main([*asked, place, str(kept), *more]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"crcbook: {kept} answers another question (its ")
            assert differs in line and "name another file, or delete it" in line
    assert (file.read_bytes(), summary.read_bytes()) == (first, old)
    file.write_bytes(first[:-5])  # by someone else
    assert main(words) == 1
    assert f"{file} exists, and is not as this command wrote it" in capsys.readouterr().err
    file.unlink()
    monkeypatch.setattr(f"crcbook.commands.{command}.{command}", getattr(crc, command))
    assert main([*words, "--json", "new.json", "--method", "crown"]) == 0
    assert file.read_bytes() != first


def test_ctrl_c_before_any_work_ends_in_one_line(tmp_path):
    """While modules are imported: one that the command line alone needs is interrupted."""
    (tmp_path / "filelock.py").write_text("raise KeyboardInterrupt\n")
    run = python("certify", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (run.returncode, run.stderr, run.stdout) == (130, "crcbook: interrupted\n", "")


HOLD = """
import sys
from pathlib import Path
from crcbook.outputs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold():
    """Another process that keeps a place to itself."""
    started = []

    def begin(path):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_do_not_work_in_one_place(own, capsys, hold):
    Path("run").mkdir()
    words = [*CERTIFY.split(), "--rows", "out.csv"], [*TRAIN, "--out", "run"]
    for path, command in zip(("out.csv", "run"), words, strict=True):
        other = hold(path)
        assert main(command) == 1
        assert f"another process works in {path}: wait" in capsys.readouterr().err
        other.kill()  # it leaves its file behind, and no lock
        other.wait()
        assert main(command) == 0
    assert not list(Path().rglob("*.lock"))


def test_reproduce_keeps_a_run_to_itself(tmp_path, capsys, hold, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = crc.Recipe(radius=0.1, epochs=1)
    tiny = Experiment("digits", 2, "softplus", recipe, width=8, box=False)
    monkeypatch.setattr("crcbook.commands.reproduce.experiments", lambda profile: {"tiny": tiny})
    Path("runs/tiny").mkdir(parents=True)
    hold("runs/tiny")
    assert main(["reproduce", "--profile", "quick", "--device", "cpu"]) == 1
    assert "another process works in runs/tiny" in capsys.readouterr().err


def python(*words, **settings):
    return subprocess.run(
        [sys.executable, "-m", "crcbook", *words], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | settings,
    )  # fmt: skip


def test_a_console_that_cannot_show_a_name_is_no_failure(own):
    Path("prüfen").mkdir()
    run = python(*CERTIFY.split(), "--rows", "prüfen/ä.csv", PYTHONIOENCODING="ascii")
    assert run.returncode == 0 and "wrote pr\\xfcfen/\\xe4.csv" in run.stdout
    assert len(table("prüfen/ä.csv")) == 250
    run = python("certify", "--model", "ü.onnx", "--data", "x.npy", PYTHONIOENCODING="ascii")
    assert run.returncode == 1 and "\\xfc.onnx" in run.stderr and "Traceback" not in run.stderr


def test_progress_is_shown_where_it_is_wanted(own):
    assert "item/s" in python(*CERTIFY.split()).stderr
    assert python(*CERTIFY.split(), TQDM_DISABLE="1").stderr == ""
    run = python(*CERTIFY.split(), "--quiet")
    assert run.stderr == "" and "mean_radius" in run.stdout


def test_a_tilde_is_ones_home(own, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    words = "certify --model ~/net.safetensors --data ~/items.npz --rows ~/out.csv --device cpu"
    assert main(words.split()) == 0
    assert len(table("../out.csv")) == 250 and not list(Path().iterdir())


def test_the_version_is_named(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("crcbook ")


def test_a_reader_that_has_seen_enough_is_no_failure(own):
    run = subprocess.run(
        f"{sys.executable} -m crcbook {CERTIFY} --quiet | true",
        shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.stderr == ""


def test_reproduce_begins_nothing_where_the_records_are_not(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def started(*arguments):
        raise AssertionError("a training began")

    monkeypatch.setattr("crcbook.commands.reproduce.reproduce", started)
    assert main(["reproduce", "--device", "cpu"]) == 1
    assert "run this in the repository's folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_may_prove_more_is_said(own, capsys):
    model, x, y = own
    words = [*CERTIFY.split(), "--method", "lipschitz"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "of 250 are far from what an attack finds: --method best or --curvature local" in shown
    assert main([*words, "--quiet"]) == 0
    assert "may prove more" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "more"),
    [
        (lambda x, y: {"x": x.astype(">f8"), "y": y.astype(">i2")}, ""),
        (lambda x, y: {"x": x.astype(np.float16), "y": y}, ""),
        (lambda x, y: {"x": np.asfortranarray(x), "y": np.eye(3)[y]}, ""),
        (lambda x, y: {"x": x.reshape(-1, 2, 2), "y": y.astype(np.uint64)}, "--limit 999"),
        (lambda x, y: {"x": x[0], "y": y[0]}, ""),
        (lambda x, y: {"x": x[0]}, ""),
        (lambda x, y: {"x": x - 0.5, "y": y}, "--box -5e-1 .5"),
        (lambda x, y: {"x": x - 0.5, "y": y}, "--box -inf 1"),
        (lambda x, y: {"x": x, "y": y}, "--curvature local --deployed float32 --targets runner-up"),
    ],
)
def test_items_may_have_many_forms(own, change, more):
    model, x, y = own
    held = change(x[:5].numpy(), y[:5].numpy())
    np.savez("items.npz", **held)
    assert main([*CERTIFY.split(), "--rows", "out.csv", *more.split()]) == 0
    rows, items = table("out.csv"), torch.from_numpy(held["x"].astype("f8")).reshape(-1, 4)
    assert len(rows) == len(items)
    answers = model.double()(items).argmax(1)
    wanted = y[: len(items)].tolist() if "y" in held else answers.tolist()
    assert [int(row["answer"]) for row in rows] == answers.tolist()
    assert [int(row["label"]) for row in rows] == wanted


def test_radii_without_an_end_are_counted(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    crc.save_model(tmp_path / "net.safetensors", model)
    np.savez(tmp_path / "x.npz", x=np.ones((6, 4), "float32"))
    words = ["--model", str(tmp_path / "net.safetensors"), "--data", str(tmp_path / "x.npz")]
    assert main(["certify", *words, "--json", str(tmp_path / "out.json")]) == 0
    assert re.search(r"^at_any_radius +6$", capsys.readouterr().out, re.M)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["at_any_radius"] == 6 and found["mean_radius"] is None


def test_a_file_of_a_float32_network_is_certified_as_its_program(own, capsys):
    assert main(f"{CERTIFY} --deployed float32 --rows rows.csv".split()) == 0
    exact = f"{CERTIFY} --rows exact.csv".split()
    assert main(exact) == 0
    rows, others = table("rows.csv"), table("exact.csv")
    assert all(float(a["radius"]) <= float(b["radius"]) for a, b in zip(rows, others, strict=True))
    assert any(float(row["radius"]) > 0 for row in rows)
