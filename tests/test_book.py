"""The book's files agree with each other: address, chapters, pins, checked outputs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import crcbook as crc
from crcbook.datasets import Dataset

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
ADDRESS = CONFIG["repository"]["url"]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))


def cells(path, kind):
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def requirements():
    """What pyproject.toml asks for, the extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def source(cell):
    return "".join(cell["source"])


def tags(cell):
    return cell["metadata"].get("tags", [])


def tracked():
    """The files of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_every_page_is_in_the_table_of_contents_and_every_entry_exists():
    chapters = [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
    listed = [TOC["root"], *chapters]
    pages = [path for kind in ("*.md", "*.ipynb") for path in (ROOT / "book").glob(kind)]
    assert sorted(listed) == sorted(f"book/{path.stem}" for path in pages)


def test_the_reference_names_everything_the_package_offers():
    page = (ROOT / "book/reference.md").read_text()
    missing = [name for name in crc.__all__ if f"crcbook.{name}" not in page]
    assert not missing


def test_every_mention_of_the_repository_is_its_address():
    mention = re.compile(r"(?:github\.com|\bgh)/[\w.-]+/crcbook|[\w-]+\.github\.io/crcbook")
    owner = ADDRESS.removeprefix("https://github.com/").removesuffix("/crcbook")
    ours = {f"github.com/{owner}/crcbook", f"gh/{owner}/crcbook", f"{owner}.github.io/crcbook"}
    for path in tracked():
        found = set(mention.findall(path.read_text(errors="ignore")))
        assert found <= ours, f"{path.name} says {found - ours}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_first_cell_installs_in_colab_only(path):
    first = source(cells(path, "code")[0])
    assert first.splitlines() == [
        "import sys",
        "",
        'if "google.colab" in sys.modules:',
        f'    %pip install --quiet "crcbook[book] @ git+{ADDRESS}"',
    ]


def test_the_package_names_the_same_repository():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Repository"] == ADDRESS


def test_requirements_are_pinned_exactly():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)
    names = [line.split("==")[0].lower().replace("_", "-") for line in pins]
    assert len(set(names)) == len(names)
    needed = {re.match(r"[\w-]+", need)[0] for needs in requirements().values() for need in needs}
    assert needed | {"sphinx", "docutils", "myst-nb", "pydata-sphinx-theme"} <= set(names)


def test_the_package_is_not_pinned():
    """An exact pin would replace the torch of Colab by one that does not fit its driver."""
    needs = [need for needs in requirements().values() for need in needs]
    assert all(re.search(r">=[\d.]+$", need) for need in needs)


def test_binder_asks_for_what_the_package_asks_for():
    """Word for word, so that a bound raised here is raised there."""
    needs = requirements()
    environment = yaml.safe_load((ROOT / "binder/environment.yml").read_text())
    *conda, wheels = environment["dependencies"]
    given = {*(need.replace("pytorch-cpu", "torch") for need in conda), *wheels["pip"]}
    assert {*needs[""], *needs["book"]} <= given
    [python] = [need.removeprefix("python=") for need in given if need.startswith("python=")]
    assert python in (ROOT / "README.md").read_text().split("git and make")[0]
    assert environment["channels"] == ["conda-forge", "nodefaults"]


def test_the_lowest_versions_are_those_of_colab_or_older():
    """Colab, November 2026; `make test-floor` tries the lowest ones."""
    colab = {"torch": "2.11", "numpy": "2.1", "plotly": "5.24", "ipython": "7.34"}
    colab |= {"ipywidgets": "7.7", "nbformat": "5.10"}
    needs = requirements()
    lowest = dict(need.split(">=") for need in needs[""] + needs["book"])

    def number(version):
        return [int(part) for part in version.split(".")]

    assert all(number(lowest[name]) <= number(version) for name, version in colab.items())


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def commands(workflow):
    """What the jobs of a workflow run, a matrix written out."""
    for job in workflow["jobs"].values():
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [""])
        for step in job["steps"]:
            for target in targets if "run" in step else []:
                yield step["run"].replace("${{ matrix.target }}", target)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_only_calls_targets_of_the_makefile(path):
    known = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    found = list(commands(yaml.safe_load(path.read_text())))
    assert found
    for command in found:
        make, target, *_ = command.split()
        assert make == "make" and target in known, command


def test_the_workflows_test_publish_and_look_ahead():
    book, weekly = (yaml.safe_load(path.read_text()) for path in WORKFLOWS)
    assert list(commands(book)) == ["make test", "make pdf"]
    targets = {"test-floor", "test-newest", "links", "explore", "soundness", "proofs"}
    assert {command.split()[1] for command in commands(weekly)} == targets
    assert all("SEED=$(date" in command for command in commands(weekly))
    pythons = book["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={pythons[0]}"
    assert all(isinstance(python, str) for python in pythons)  # 3.10 is not 3.1
    [uploaded] = [step["with"]["path"] for step in book["jobs"]["test"]["steps"]
                  if "upload" in step.get("uses", "")]  # fmt: skip
    assert uploaded == "_build/html"
    assert book["jobs"]["publish"]["needs"] == "test"


def test_the_addresses_of_the_pages_agree():
    base = CONFIG["html"]["baseurl"]
    owner, name = ADDRESS.removeprefix("https://github.com/").split("/")
    assert base == f"https://{owner}.github.io/{name}/"
    settings = CONFIG["sphinx"]["config"]
    assert settings["notfound_urls_prefix"] == f"/{name}/"
    assert f'href="/{name}/{TOC["root"]}.html"' in settings["notfound_context"]["body"]
    for path in (ROOT / "README.md", ROOT / "book/index.md"):
        assert f"{base}crcbook.pdf" in path.read_text()


def test_the_example_of_the_readme_runs_in_a_checkout(monkeypatch):
    x = torch.rand(100, 28, 28, generator=torch.Generator().manual_seed(0))
    images = crc.Split(x, torch.arange(100) % 10)
    monkeypatch.setattr(crc, "load", lambda name: Dataset(name, images, images))
    monkeypatch.chdir(ROOT)
    [example] = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    exec(example, {})


def test_the_citation_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["repository-code"] == ADDRESS
    assert citation["url"] == CONFIG["html"]["baseurl"]
    assert project["license"] in citation["license"]
    released = f"## {citation['version']} ({citation['date-released']})"
    assert released in (ROOT / "CHANGELOG.md").read_text()


def test_both_licences_are_here_in_full():
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License")
    text = (ROOT / "book/LICENSE").read_text()
    assert text.startswith("Creative Commons Attribution 4.0 International")
    assert "Section 8" in text


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_checked_cells_hold_an_output_to_check_and_no_others_do(path):
    checked = [cell for cell in cells(path, "code") if "nbval-check-output" in tags(cell)]
    assert checked
    for cell in cells(path, "code"):
        assert bool(cell["outputs"]) == ("nbval-check-output" in tags(cell)), source(cell)
        assert (cell["execution_count"] is not None) == bool(cell["outputs"]), source(cell)
        assert "skip-execution" not in tags(cell) and "nbval-skip" not in tags(cell)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_are_short_cells_that_say_what_to_expect(path):
    code = cells(path, "code")
    in_view = [c for c in code if not {"hide-input", "hide-cell"} & set(tags(c))]
    lengths = sorted(len(cell["source"]) for cell in in_view)
    assert lengths[len(lengths) // 2] < 10
    assert max(len(cell["source"]) for cell in code) < 30
    assert "At a glance" in source(cells(path, "markdown")[0])
    for cell in cells(path, "markdown"):
        assert "```{" not in source(cell), "Colab shows a backtick directive as code; use :::"


def figures(path):
    """The cells that draw, each with the number's name and the caption it has."""
    drawing = [
        c for c in cells(path, "code") if re.search(r"^\w+\.(show|explorer)\(", source(c), re.M)
    ]
    return [(c, c["metadata"].get("mystnb", {}).get("figure", {})) for c in drawing]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_captions_all_of_its_figures_or_none(path):
    found = figures(path)
    if any(caption for _, caption in found):
        for cell, caption in found:
            assert re.fullmatch(r"fig-[a-z0-9-]+", caption["name"]), source(cell)
            assert len(caption["caption"].split()) >= 8, "say what to see"


def test_figures_have_a_name_each_and_every_name_is_a_figure():
    names = [caption["name"] for path in CHAPTERS for _, caption in figures(path) if caption]
    pages = [path for kind in ("*.md", "*.ipynb") for path in (ROOT / "book").glob(kind)]
    for path in (page for page in pages if page.suffix == ".md"):
        names += re.findall(r"^ +name: (fig-[a-z0-9-]+)$", path.read_text(), re.M)
    assert len(set(names)) == len(names)
    asked = {
        name for path in pages for name in re.findall(r"{numref}`(fig-[^`]+)`", path.read_text())
    }
    assert asked <= set(names)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_fold_of_a_captioned_chapter_says_what_for(path):
    folded = [cell for cell in cells(path, "code") if "hide-input" in tags(cell)]
    if any(caption for _, caption in figures(path)):
        assert all(cell["metadata"].get("mystnb", {}).get("code_prompt_show") for cell in folded)


def test_no_folder_is_loaded_on_every_page_by_its_name():
    assert not [path for path in tracked() if "_static" in path.parts]


def test_a_failing_cell_fails_the_build():
    assert CONFIG["execute"]["raise_on_error"] is True
    assert CONFIG["execute"]["execute_notebooks"] == "force"
    assert "allow_errors" not in CONFIG["execute"]
    assert "jupyter-book build . -n -W --keep-going" in (ROOT / "Makefile").read_text()


def test_make_alone_lists_the_targets():
    alone = {"PATH": os.environ["PATH"]}  # not as a part of the make that runs this test
    run = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, env=alone)
    for target in ("book", "serve", "test", "clean"):
        assert re.search(rf"^make {target} +\w", run.stdout, re.M), run.stdout


def test_make_names_the_package_that_brings_a_missing_venv(tmp_path):
    """On Debian, python3 comes without ensurepip until python3.x-venv is installed."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\ncase "$2" in *version_info*) echo 3.11 ;; *) exit 1 ;; esac\n')
    python.chmod(0o755)
    run = make_alone(tmp_path, "install")  # no other Python may help out
    assert run.returncode != 0
    assert "apt install python3.11-venv" in run.stderr


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("3.14", "A Python from 3.11 to 3.13 is needed; found was 3.14."),
        ("3.9", "A Python from 3.11 to 3.13 is needed; found was 3.9."),
        (None, "No Python from 3.11 to 3.13 was found."),
    ],
)
def test_make_names_the_python_that_is_too_old_or_too_new(tmp_path, version, said):
    (tmp_path / "bin").mkdir()
    if version is not None:
        python = tmp_path / "bin" / "python3"
        python.write_text(f"#!/bin/sh\necho {version}\n")
        python.chmod(0o755)
    run = make_alone(tmp_path, "install")
    assert run.returncode != 0 and said in run.stderr


def make_alone(folder, *words):
    """Make in a copy of its files, with no program but those of its folder ``bin``."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (folder / name).write_text((ROOT / name).read_text())
    for name in ("book", "crcbook", "tools"):
        (folder / name).mkdir()
    return subprocess.run(
        [shutil.which("make"), *words], cwd=folder, capture_output=True, text=True,
        env={"PATH": str(folder / "bin")},
    )  # fmt: skip


def test_one_variable_names_an_index_for_torch(tmp_path):
    wanted = "--extra-index-url https://example.org/cpu"
    assert wanted in make_alone(tmp_path, "--dry-run", "install", f"INDEX={wanted[18:]}").stdout


def test_a_taken_port_is_named_with_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = subprocess.run([sys.executable, ROOT / "tools" / "serve.py", str(port)],
                             capture_output=True, text=True)  # fmt: skip
    assert run.returncode != 0
    pattern = rf"Port {port} cannot be used \([^)]+\): make serve PORT=(\d+) works\n"
    said = re.fullmatch(pattern, run.stderr)
    with socket.create_server(("127.0.0.1", int(said[1]))):
        assert int(said[1]) != port


def test_an_installed_package_carries_every_file_it_reads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data = [path for path in tracked() if ROOT / "crcbook" in path.parents and path.suffix != ".py"]
    found = {f"crcbook.{path.parent.name}/{path.name}" for path in data}
    carried = project["package-data"]
    assert found == {f"{package}/{name}" for package in carried for name in carried[package]}
