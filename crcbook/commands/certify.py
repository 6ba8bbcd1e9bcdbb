"""``python -m crcbook certify``: how far each item can move before its label can change."""

import argparse
import math
from statistics import mean, median

from crcbook.certificate import certify
from crcbook.certificate.results import CLOSE
from crcbook.commands import items
from crcbook.commands.answering import answer, fraction
from crcbook.commands.items import Request
from crcbook.commands.rows import Row, number

SUMMARY = "certify items: how far each can move before its label can change"

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
    answer(options, "certify", _rows, _summary, _open)


def _rows(asked: Request, part: slice) -> list[Row]:
    x, y = asked.x[part], asked.y[part]
    found = certify(asked.model, x, y, **asked.options)
    columns = {
        "index": range(part.start, part.stop),
        "label": y.tolist(),
        "answer": asked.answer[part].tolist(),
        "radius": [number(one) for one in found.radius.tolist()],
        "target": found.target.tolist(),
        "method": found.method,
        "exact": found.exact.tolist(),
        "distance": [number(one) for one in found.distance.tolist()],
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _summary(asked: Request, rows: list[Row]) -> dict:
    correct = [row for row in rows if row["label"] == row["answer"]]
    radius = [float(row["radius"] or 0) for row in rows]
    of_correct = [float(row["radius"] or 0) for row in correct]
    figures = {"accuracy": fraction(len(correct), len(rows)) if asked.labelled else None}
    certified = {
        f"{one:g}": fraction(sum(bound >= one for bound in radius), len(rows))
        for one in asked.radius
    }
    endless = sum(map(math.isinf, of_correct))
    average = mean(of_correct) if of_correct else math.inf
    middle = median(of_correct) if of_correct else math.inf
    return figures | {
        "certified_accuracy": certified,
        "mean_radius": average if math.isfinite(average) else None,
        "median_radius": middle if math.isfinite(middle) else None,
        "exact_fraction": fraction(sum(row["exact"] is True for row in correct), len(correct)),
        **({"at_any_radius": endless} if endless else {}),
    }


def _open(rows: list[Row]) -> int:
    """For how many items no adversarial point is known a little beyond the radius."""
    correct = [row for row in rows if row["label"] == row["answer"]]
    sizes = [(float(row["radius"] or 0), float(row["distance"] or 0)) for row in correct]
    return sum(radius < CLOSE * distance for radius, distance in sizes)
