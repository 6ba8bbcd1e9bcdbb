"""What ``certify`` and ``verify`` do alike: rows of items, a summary of them."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from crcbook.certificate.results import hint, untried
from crcbook.checkpoints import read_json, write_json
from crcbook.commands.items import Request, read_request
from crcbook.commands.rows import Row, Rows
from crcbook.experiments import environment
from crcbook.outputs import check_same_question, check_writable

_WAYS = "--method best", "--curvature local", "--box LOW HIGH, if inputs have limits,"


def answer(
    options: argparse.Namespace,
    name: str,
    find: Callable[[Request, slice], list[Row]],
    summary: Callable[[Request, list[Row]], dict],
    open_: Callable[[list[Row]], int],
) -> None:
    """Answer a command: read, check, find the rows that are missing, and sum them up.

    Args:
        options: what was typed.
        name: of the command.
        find: the rows of some items.
        summary: the figures of all rows.
        open_: for how many items proof and attack are far apart.

    Raises:
        RuntimeError: for a file that cannot be read or written.
        TypeError: for arrays of the wrong kind.
        ValueError: for a question that cannot be asked.
    """
    if options.rows is not None and options.rows == options.json:
        raise ValueError("--rows and --json must name two files")
    items = read_request(options)
    radius = {"radius": items.radius} if name == "verify" else {}
    if not all(radius.values()):
        raise ValueError("verify needs one or more radii: give --radius R")
    asked = {"command": name} | items.options | {"radius": items.radius, "sha256": items.hashes}
    if options.json is not None:
        check_writable(options.json)
        if options.json.exists():
            check_same_question(options.json, _read(options.json), asked)
    device = options.device.partition(":")[0]
    about = {"command": name, **items.hashes, **items.options, "device": device, **radius}
    # Options that do not go together are refused before the work: a wrong label takes none.
    one = items.answer[:1]
    trial = replace(items, x=items.x[:1], y=(one == 0).long(), answer=one)
    find(trial, slice(0, 1))
    with Rows.at(options.rows, about) as rows:
        options.after_interrupt = "; --rows FILE keeps what is done, for the same command to go on"
        if options.rows is not None:
            options.after_interrupt = f"; the same command goes on from {rows.part}"
        found = "wrote" if options.rows is None or not options.rows.exists() else "found"
        rows.fill(len(items.x), items.chunk, lambda part: find(items, part), options.progress)
        rows.finish()
        figures = {"items": len(items.x), **summary(items, rows.rows)}
        figures["seconds"] = round(rows.seconds, 3)
    for key, value in figures.items():
        for at, one in value.items() if isinstance(value, dict) else [("", value)]:
            shown = "none" if one is None else format(one, ".6g")
            print(f"{f'{key} at {at}' if at else key:34} {shown}")
    left = untried(items.options["method"], items.options["curvature"], items.options["box"], _WAYS)
    note = hint(open_(rows.rows), len(items.x), left)
    if note and not options.quiet:
        print(note)
    if options.rows is not None:
        print(f"{found} {options.rows}")
    if options.json is not None:
        where = {"environment": environment(options.device)}
        write_json(options.json, items.about | asked | figures | where)
        print(f"wrote {options.json}")


def _read(path: Path) -> dict | None:
    try:
        return read_json(path)
    except RuntimeError:  # whatever it is, it is no summary
        return None


def fraction(part: int, whole: int) -> float | None:
    """A fraction, for a summary.

    Args:
        part: how many.
        whole: of how many.

    Returns:
        The fraction; None of nothing.
    """
    return round(part / whole, 6) if whole else None
