"""Record what the chapters print: ``python tests/notebooks/record.py book/*.ipynb``.

A chapter keeps the outputs of its cells tagged ``nbval-check-output``, which the tests compare, and
no others, so that a change of a figure is no change of the file.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def record(path: Path) -> None:
    """Execute a notebook and write it back with its checked outputs only."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=600,
        coalesce_streams=True,
        resources={"metadata": {"path": path.parent}},
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            if "nbval-check-output" not in cell.metadata.get("tags", []):
                cell.outputs, cell.execution_count = [], None
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel})
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record(Path(name))
