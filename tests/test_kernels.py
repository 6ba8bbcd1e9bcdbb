"""Chapters run wherever a notebook program starts their kernel."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
CHAPTER = "the_record_in_full.ipynb"  # it reads the records, and draws them


@pytest.mark.parametrize("folder", ["", "book"])
@pytest.mark.parametrize("settings", [{}, {"VSCODE_PID": "1"}], ids=["plain", "VS Code"])
def test_a_chapter_runs_in_its_own_folder_and_at_the_root(folder, settings):
    chapter = nbformat.read(ROOT / "book" / CHAPTER, as_version=4)
    code = [cell for cell in chapter.cells if cell.cell_type == "code"]
    [drawn] = [place for place, cell in enumerate(code) if "go.Figure(" in cell.source]
    chapter.cells = code[: drawn + 1]  # plotly's way to show a figure depends on the program
    place = {"metadata": {"path": ROOT / folder}}
    NotebookClient(chapter, timeout=600, resources=place).execute(env=os.environ | settings)
    shown = [kind for output in chapter.cells[-1].outputs for kind in output.data]
    assert "application/vnd.plotly.v1+json" in shown
