"""The command line, as a newcomer uses it."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import crcbook as crc
from crcbook.commands import main, parser
from crcbook.experiments import Experiment
from crcbook.training import METHODS, loop

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
    assert main(["verify", *words]) == 0
    verdicts = json.loads(figures.read_text())
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
    model, figures = tmp_path / "model.safetensors", tmp_path / "figures.json"
    crc.save_model(model, bent_model)
    words = ["certify", str(model), "--dataset", "digits", "--radius", "0.3", "--limit", "60",
             "--device", "cpu", "--json", str(figures)]  # fmt: skip
    certified = []
    for curvature in ("global", "local"):
        assert main([*words, "--method", "dual", "--curvature", curvature]) == 0
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
    assert "moons has 2 values an item, the network takes 64" in capsys.readouterr().err


def test_of_several_gammas_validation_keeps_one(tmp_path, capsys):
    run = tmp_path / "run"
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
        attack_dtype="bfloat16", curvature="local", curvature_every=2, loss_q=0.3,
        validate_every=2, seed=3,
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
