"""What certificates can do without: the packages of the extras."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODULES = {"ipython": "IPython", "python-flint": "flint", "scikit-learn": "sklearn"}
PACKAGES = {re.match(r"[\w-]+", need)[0] for needs in EXTRAS.values() for need in needs}

CERTIFY = """
import torch
import crcbook as crc
import crcbook.__main__, crcbook.experiments

model = crc.mlp([4, 8, 3], seed=0)
x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
y = model(x).argmax(1)
assert (crc.certify(model, x, y).radius > 0).all()
crc.train(model, crc.Split(x, y), crc.Recipe("standard", epochs=1))
"""


def run_without(packages, program):
    """A program's run where importing any of some packages fails, as it does without them."""
    names = [MODULES.get(package, package) for package in sorted(packages)]
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({names}))\n"
    command = [sys.executable, "-c", blocked + program]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_certificates_and_training_need_no_extra():
    run = run_without(PACKAGES, CERTIFY)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("package", "program", "extra"),
    [
        ("scikit-learn", "import crcbook as crc; crc.load('moons')", "experiments"),
        ("scikit-learn", "import crcbook as crc; crc.load('digits')", "experiments"),
        ("torchvision", "import crcbook as crc; crc.load('mnist')", "experiments"),
        ("plotly", "from crcbook.book import plots", "book"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(package, program, extra):
    run = run_without({package}, program)
    assert run.returncode != 0
    last = run.stderr.splitlines()[-1]
    assert package in last and f"crcbook[{extra}]" in last
    assert package in {re.match(r"[\w-]+", need)[0] for need in EXTRAS[extra]}
