"""Measure each chapter's kernel as Binder would run it: ``make memory``.

A chapter's kernel, with every process it starts, on one core; the table shows the largest memory
it held at once (proportional set size, so that shared pages count once) and its seconds. Binder
gives 2 GB, of which JupyterLab, not measured here, and what a reader opens beside it need their
part: a chapter may take 1.5 GB. The build of torch is named, since one with CUDA takes about
0.3 GB more than the CPU build that Binder installs.
"""

import os
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient

_SECONDS_BETWEEN_SAMPLES = 0.2


def watch(peak: list[float], done: threading.Event) -> None:
    """Keep the largest memory of this process's children in ``peak[0]``."""
    while not done.wait(_SECONDS_BETWEEN_SAMPLES):
        total = 0
        for child in psutil.Process().children(recursive=True):
            try:
                total += child.memory_full_info().pss
            except psutil.Error:  # it has ended
                continue
        peak[0] = max(peak[0], total / 1e9)


def measure(path: Path) -> tuple[float, float]:
    """A chapter's largest memory in GB, and its seconds."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": path.parent}})
    peak, done, started = [0.0], threading.Event(), time.perf_counter()
    watcher = threading.Thread(target=watch, args=(peak, done))
    watcher.start()
    try:
        client.execute()
        seconds = time.perf_counter() - started
    finally:
        done.set()
        watcher.join()
    return peak[0], seconds


def main() -> int:
    """Measure every chapter and print a table.

    Returns:
        The exit status: 1 where a chapter takes more than 1.5 GB.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    largest = 0.0
    print(f"torch {version('torch')}")
    print(f"{'chapter':36}{'GB':>6}{'s':>8}")
    for path in sorted((Path(__file__).parents[1] / "book").glob("*.ipynb")):
        gigabytes, seconds = measure(path)
        largest = max(largest, gigabytes)
        print(f"{path.stem:36}{gigabytes:6.2f}{seconds:8.0f}", flush=True)
    return int(largest > 1.5)


if __name__ == "__main__":
    sys.exit(main())
