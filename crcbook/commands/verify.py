"""``python -m crcbook verify``: whether each label is certain within given radii."""

import argparse

from crcbook.certificate import verify
from crcbook.commands import items
from crcbook.commands.answering import answer, fraction
from crcbook.commands.items import Request
from crcbook.commands.rows import Row, number

SUMMARY = "decide for items whether their labels are certain within given radii"


add_arguments = items.add_arguments


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what was typed.

    Raises:
        RuntimeError: for a file that cannot be read or written.
        TypeError: for arrays of the wrong kind.
        ValueError: for a question that cannot be asked.
    """
    answer(options, "verify", _rows, _summary, _open)


def _rows(asked: Request, part: slice) -> list[Row]:
    x, y, answered = asked.x[part], asked.y[part], asked.answer[part]
    rows: list[Row] = []
    for radius in asked.radius:
        found = verify(asked.model, x, y, radius=radius, **asked.options)
        robust = found.robust.cpu()
        broken = found.nearest.flatten(1).isfinite().all(1).tolist()
        columns = zip(
            range(part.start, part.stop), y.tolist(), answered.tolist(), robust.tolist(),
            broken, found.margin.tolist(), found.target.tolist(), strict=True,
        )  # fmt: skip
        for index, label, own, proved, wrong, margin, target in columns:
            verdict = "robust" if proved else "adversarial" if wrong else "undecided"
            verdict = verdict if label == own else "misclassified"
            row: Row = {"index": index, "label": label, "answer": own, "radius": radius}
            rows.append(row | {"verdict": verdict, "margin": number(margin), "target": target})
    return rows


def _summary(asked: Request, rows: list[Row]) -> dict:
    whole = len(asked.y)
    correct = int((asked.y == asked.answer).sum())
    figures: dict = {"accuracy": fraction(correct, whole) if asked.labelled else None}
    for verdict in ("robust", "undecided", "adversarial"):
        figures[verdict] = {}
        for radius in asked.radius:
            same = [row for row in rows if row["radius"] == radius and row["verdict"] == verdict]
            figures[verdict][f"{radius:g}"] = fraction(len(same), whole)
    return figures


def _open(rows: list[Row]) -> int:
    """How many items are undecided at one radius or several."""
    return len({row["index"] for row in rows if row["verdict"] == "undecided"})
