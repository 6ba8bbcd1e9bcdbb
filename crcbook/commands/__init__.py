"""The command line, ``python -m crcbook``: a module a command.

A command's module has the ``SUMMARY`` that ``--help`` shows, ``add_arguments`` and ``run``. What a
user can get wrong ends in one line on stderr: status 2 where the words themselves are wrong, 1
where what they name is.
"""

import argparse
import io
import os
import re
import sys
from importlib import metadata
from types import ModuleType

import torch

from crcbook.commands import certify, check, prove, reproduce, train, verify
from crcbook.commands.arguments import OneLineParser, check_device

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "certify": certify,
    "verify": verify,
    "prove": prove,
    "check": check,
    "reproduce": reproduce,
}
_EXPLAINED = (ValueError, TypeError, RuntimeError, ImportError, OSError, MemoryError)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; ``sys.argv`` where None.

    Returns:
        The exit status: 0, 1 after an error that was explained, or 130 after Ctrl-C. Wrong words
        end the process with status 2.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that a console cannot show is no failure
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options, unknown = parser().parse_known_args(arguments)
    if unknown:
        options.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    options.progress = not (options.quiet or os.environ.get("TQDM_DISABLE"))
    try:
        check_device(options)
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _EXPLAINED as error:
        print(f"crcbook: {_in_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"crcbook: interrupted{options.after_interrupt}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The words that the command line knows.

    Returns:
        The parser; what it parsed has the command's ``run``.
    """
    whole = OneLineParser(
        prog="python -m crcbook",
        description="Provable robustness by curvature: train and certify networks.",
    )
    whole.add_argument("--version", action="version", version=_version())
    commands = whole.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(command)
        command.add_argument("--quiet", action="store_true", help="show no progress, figures alone")
        command.set_defaults(run=module.run, refuse=command.error, after_interrupt="")
    return whole


def _version() -> str:
    try:
        own = metadata.version("crcbook")
    except metadata.PackageNotFoundError:  # a checkout that is on the path and not installed
        own = "(not installed)"
    return f"crcbook {own}, torch {torch.__version__}"


def _in_one_line(error: BaseException) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch prints some in colour
    return " ".join(plain.split()) or type(error).__name__
