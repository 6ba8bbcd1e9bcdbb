"""The command line, as a newcomer uses it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from crcbook.__main__ import _parser, main
from crcbook.training import METHODS

TRAIN = ["train", "--dataset", "digits", "--width", "24", "--epochs", "3", "--batch-size", "64",
         "--radius", "0.4", "--gamma", "0.02", "--device", "cpu"]  # fmt: skip


def test_train_then_certify(tmp_path, capsys):
    run, figures = tmp_path / "run", tmp_path / "out.json"
    assert main([*TRAIN, "--out", str(run)]) == 0
    assert "kept epoch" in capsys.readouterr().out
    facts = json.loads((run / "run.json").read_text())
    assert facts["recipe"]["gamma"] == 0.02 and len(facts["history"]) == 3
    assert main(["certify", str(run), "--dataset", "digits", "--radius", "0.4", "--limit", "100",
                 "--box", "--json", str(figures), "--device", "cpu"]) == 0  # fmt: skip
    out = json.loads(figures.read_text())
    assert out["images"] == 100 and out["violations"] == 0
    assert 0.5 < out["clean_accuracy"] <= 1
    assert 0 < out["certified_accuracy"] <= out["certified_accuracy_runner_up"]
    assert out["certified_accuracy"] <= out["empirical_accuracy"] <= out["clean_accuracy"]
    assert out["certified_accuracy"] <= out["certified_accuracy_box"]
    assert out["certified_accuracy_box"] <= out["empirical_accuracy_box"]
    assert out["violations_box"] == 0
    assert out["mean_radius"] > 0 and 0 < out["exact_fraction"] <= 1 and out["seconds"] > 0
    assert "certified_accuracy" in capsys.readouterr().out


def test_of_several_gammas_validation_keeps_one(tmp_path):
    run = tmp_path / "run"
    assert main([*TRAIN, "--gamma", "0.01", "0.5", "--out", str(run)]) == 0
    facts = json.loads((run / "run.json").read_text())
    certified = [candidate["certified_accuracy"] for candidate in facts["candidates"]]
    assert len(certified) == 2 and facts["validation"]["certified_accuracy"] == max(certified)
    assert (run / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["certify", "nowhere", "--dataset", "digits"], "cannot read nowhere"),
        ([*TRAIN, "--out", "/dev/null/run"], "cannot write"),
        ([*TRAIN, "--out", "unused", "--layers", "0"], "--layers must be at least 1"),
        ([*TRAIN, "--out", "unused", "--radius", "-1"], "radius must be positive"),
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
    assert _parser().parse_args(["reproduce"]).device == device
