"""A row an item, kept as the work goes on, so that an interrupted command can go on from there."""

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
from crcbook.outputs import check_writable, locked

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

    @classmethod
    @contextmanager
    def at(cls, path: Path | None, about: dict) -> Iterator["Rows"]:
        """Rows of one process, with those that an interrupted one has left.

        Args:
            path: a ``.csv`` or ``.json`` file; None keeps them nowhere.
            about: what they depend on, anything JSON can hold.

        Yields:
            The rows.

        Raises:
            RuntimeError: where the file cannot be written, or another process writes it.
            ValueError: where it is of another format, or what is left belongs to another question.
        """
        if path is not None:
            if path.suffix not in (".csv", ".json"):
                raise ValueError(f"--rows writes .csv or .json; got {path}")
            check_writable(path)
        with nullcontext() if path is None else locked(path):
            known = {"program": digest(sorted(PACKAGE.rglob("*.py"))), "torch": torch.__version__}
            rows = cls(path, json.loads(json.dumps(about | known)))
            rows._read()
            yield rows

    def _read(self) -> None:
        part = self.part
        if part is None or not part.exists():
            return
        try:
            lines = part.read_text().splitlines(keepends=True)
            # A line is written at once, but a machine that stops can leave a piece of one.
            about, *chunks = [json.loads(line) for line in lines if line.endswith("\n")] or [None]
        except (OSError, ValueError) as error:
            raise RuntimeError(f"cannot read {part} ({error}): delete it to begin anew") from error
        if about != self.about:
            named = about if isinstance(about, dict) else {}
            differing = [key for key, value in self.about.items() if named.get(key) != value]
            raise ValueError(
                f"{part} has the first rows of another question (its {', '.join(differing)} "
                "differs): delete it to begin anew, or name another --rows"
            )
        for chunk in chunks:
            self.items += chunk["items"]
            self.rows += chunk["rows"]
            self.seconds += chunk["seconds"]
        # What goes on must begin on a line of its own.
        whole = [self.about, *chunks]
        write_atomically(part, "".join(json.dumps(line) + "\n" for line in whole).encode())

    def fill(self, total: int, chunk: int, find: Callable[[slice], list[Row]], bar: bool) -> None:
        """Find the rows that are missing.

        Args:
            total: how many items there are.
            chunk: how many are asked about at a time: what an interruption loses.
            find: the rows of some items.
            bar: whether to show a progress bar.
        """
        part = self.part
        if part is not None and not part.exists():
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
        """Write the file: it is whole, or not there."""
        if self.path is None or self.part is None:
            return
        if self.path.suffix == ".json":
            lines = ",\n".join(json.dumps(row) for row in self.rows)
            write_atomically(self.path, f"[\n{lines}\n]\n".encode())
        else:
            table = io.StringIO()
            writer = csv.DictWriter(table, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomically(self.path, table.getvalue().encode())
        self.part.unlink()
