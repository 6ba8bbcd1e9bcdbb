"""A row an item, kept as the work goes on: the same command goes on from there, or is answered."""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from crcbook.checkpoints import write_atomically
from crcbook.experiments.records import PACKAGE, digest
from crcbook.outputs import check_same_question, check_writable, locked

Row = dict[str, int | float | str | bool | None]


def number(value: float) -> float | str:
    """A number as a row holds it.

    Args:
        value: any.

    Returns:
        It, or where it is not finite, which JSON cannot say, a text that ``float`` takes.
    """
    return value if math.isfinite(value) else str(value)


@dataclass
class Rows:
    """The rows of a command.

    Attributes:
        path: where they go at the end; None keeps them nowhere.
        about: what they depend on.
        rows: those known.
        items: how many items they are about.
        seconds: how long they took, those before an interruption too.
    """

    path: Path | None
    about: dict
    rows: list[Row] = field(default_factory=list)
    items: int = 0
    seconds: float = 0.0

    @property
    def part(self) -> Path | None:
        """Where rows are kept until all are known."""
        return self.path and self.path.with_name(f"{self.path.name}.part")

    @property
    def kept(self) -> Path | None:
        """Where they are kept after that, with the question that the file itself does not say."""
        return self.path and self.path.with_name(f".{self.path.name}.rows")

    @classmethod
    @contextmanager
    def at(cls, path: Path | None, about: dict) -> Iterator["Rows"]:
        """Rows of one process, with those that an earlier one has left.

        Args:
            path: a ``.csv`` or ``.json`` file; None keeps them nowhere.
            about: what they depend on, anything JSON can hold.

        Yields:
            The rows.

        Raises:
            RuntimeError: where the file cannot be written, or another process writes it.
            ValueError: where it is of another format, or what is there answers another question.
        """
        if path is not None:
            if path.suffix not in (".csv", ".json"):
                raise ValueError(f"--rows writes .csv or .json; got {path}: name rows.csv, say")
            check_writable(path)
        with nullcontext() if path is None else locked(path):
            known = {"program": digest(sorted(PACKAGE.rglob("*.py"))), "torch": torch.__version__}
            rows = cls(path, json.loads(json.dumps(about | known)))
            rows._read()
            yield rows

    def _read(self) -> None:
        if self.path is None or self.part is None or self.kept is None:
            return
        finished = self.path.exists()
        log = self.kept if finished else self.part
        if not log.exists():
            if finished:
                check_same_question(self.path, None, self.about)
            return
        try:
            lines = log.read_text().splitlines(keepends=True)
            # A line is written at once, but a machine that stops can leave a piece of one.
            about, *chunks = [json.loads(line) for line in lines if line.endswith("\n")] or [None]
            self.items = sum(chunk["items"] for chunk in chunks)
            self.rows = [row for chunk in chunks for row in chunk["rows"]]
            self.seconds = sum(chunk["seconds"] for chunk in chunks)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RuntimeError(f"cannot read {log} ({error}): delete it to begin anew") from error
        check_same_question(self.path if finished else log, about, self.about)
        if not finished:  # what goes on must begin on a line of its own
            whole = [self.about, *chunks]
            write_atomically(log, "".join(json.dumps(line) + "\n" for line in whole).encode())
        elif self.path.read_bytes() != self._content():
            check_same_question(self.path, None, self.about)

    def fill(self, total: int, chunk: int, find: Callable[[slice], list[Row]], bar: bool) -> None:
        """Find the rows that are missing.

        Args:
            total: how many items there are.
            chunk: how many are asked about at a time: what an interruption loses.
            find: the rows of some items.
            bar: whether to show a progress bar.
        """
        part = self.part
        if part is not None and not self.items:
            write_atomically(part, (json.dumps(self.about) + "\n").encode())
        with tqdm(total=total, initial=self.items, disable=not bar, unit="item") as shown:
            while self.items < total:
                started, stop = time.time(), min(self.items + chunk, total)
                found = find(slice(self.items, stop))
                count, seconds = stop - self.items, time.time() - started
                if part is not None:
                    line = {"items": count, "seconds": seconds, "rows": found}
                    with part.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                shown.update(count)
                self.rows += found
                self.seconds += seconds
                self.items = stop

    def finish(self) -> None:
        """Write the file, where it is not there: it is whole, or not there."""
        if self.path is None or self.part is None or self.kept is None or self.path.exists():
            return
        write_atomically(self.path, self._content())
        self.part.replace(self.kept)

    def _content(self) -> bytes:
        """The file."""
        if self.path is not None and self.path.suffix == ".json":
            lines = ",\n".join(json.dumps(row) for row in self.rows)
            return f"[\n{lines}\n]\n".encode()
        table = io.StringIO()
        writer = csv.DictWriter(table, list(next(iter(self.rows), {})), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return table.getvalue().encode()
