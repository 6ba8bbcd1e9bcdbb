"""``python -m crcbook reproduce``: run the book's experiments that have no record yet."""

import argparse
from pathlib import Path

from crcbook.checkpoints import read_json
from crcbook.commands.arguments import add_device, path
from crcbook.experiments import PROFILES, experiments, reproduce
from crcbook.outputs import check_writable

SUMMARY = "run the book's experiments that have no record yet"
_RECORDS = Path("book/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments.

    Args:
        parser: the command's.
    """
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="full",
        help="full: the book's tables, hours; quick: the bundled digits, minutes")  # fmt: skip
    add("--only", nargs="+", metavar="NAME", help="run these experiments alone")
    add("--results", type=path,
        help="folder of the records; where not given, book/results (full) or results below --runs "
        "(quick)")  # fmt: skip
    add("--runs", type=path, default=Path("runs"), help="folder of checkpoints and weights")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what was typed.

    Raises:
        RuntimeError: where a file cannot be written, or belongs to another experiment.
        ValueError: for an unknown experiment, or outside the book's repository.
    """
    options.after_interrupt = "; the same command goes on where it stopped"
    wanted = experiments(options.profile)
    if options.only:
        unknown = sorted(set(options.only) - set(wanted))
        if unknown:
            raise ValueError(
                f"the {options.profile} profile has no experiment {', '.join(unknown)}; "
                f"it has {', '.join(wanted)}"
            )
        wanted = {name: wanted[name] for name in options.only}
    results = options.results
    if results is None and options.profile == "quick":
        results = options.runs / "results"
    elif results is None and not _RECORDS.is_dir():
        raise ValueError(
            f"the book's records are not here ({Path.cwd()} has no {_RECORDS}), and without them "
            "every network would be trained anew, for hours: run this in the repository's folder, "
            "or name a folder for new records with --results"
        )
    results = results or _RECORDS
    for folder in (results, options.runs):
        check_writable(folder / "file")
    written = reproduce(wanted, results, options.runs, options.device, options.progress)
    for name in wanted:
        record_path = results / f"{name}.json"
        if record_path.exists():
            record = read_json(record_path)
            figures = f"clean {record['clean_accuracy']:.2%}  "
            figures += f"certified {record['certified_accuracy']:.2%}"
            kind = "new" if record_path in written else "recorded"
            print(f"{name:34} {figures}  {kind} {record_path}")
