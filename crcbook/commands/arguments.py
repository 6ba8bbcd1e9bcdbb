"""What the commands' arguments have in common."""

import argparse
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import torch

from crcbook.checks import as_radius


class OneLineParser(argparse.ArgumentParser):
    """A parser that shows every default worth showing, and explains a mistake in one line."""

    def __init__(self, **options: Any) -> None:
        """Start a parser.

        Args:
            options: those of :class:`argparse.ArgumentParser`.
        """
        settings: dict[str, Any] = {"formatter_class": _Help, "allow_abbrev": False}
        super().__init__(**settings | options)
        # Its own pattern takes -1e-3 and -inf for options.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf)")

    def error(self, message: str) -> NoReturn:
        """End with what was wrong and where the right words are listed.

        Args:
            message: what was wrong.
        """
        self.exit(2, f"crcbook: {' '.join(message.split())} ({self.prog} --help says more)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every default, where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


def path(text: str) -> Path:
    """A file or folder, for ``type=``.

    Args:
        text: what was typed, where ``~`` is one's home folder.

    Returns:
        The path.

    Raises:
        ArgumentTypeError: for an empty name, or one that no file can have.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("a file or folder must have a name")
    return Path(os.path.expanduser(text))


def code(text: str) -> tuple[Path, str]:
    """What a Python file calls a network, for ``type=``.

    Args:
        text: what was typed.

    Returns:
        The file and the name.

    Raises:
        ArgumentTypeError: for anything but ``FILE.py:NAME``.
    """
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be FILE.py:NAME; got {text!r}")
    return path(file), name


def count(text: str) -> int:
    """A number of things, for ``type=``.

    Args:
        text: what was typed.

    Returns:
        The number, at least 1.

    Raises:
        ArgumentTypeError: for anything else.
    """
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from error
    if not 1 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 1 and below 2**63; got {number}")
    return number


def radius(text: str) -> float:
    """An l2 radius, for ``type=``.

    Args:
        text: what was typed.

    Returns:
        The radius.

    Raises:
        ArgumentTypeError: where it is none, as :func:`crcbook.checks.as_radius` says.
    """
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a radius must be a number; got {text!r}") from error
    try:
        return as_radius(value)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``.

    Args:
        parser: the command's.
    """
    parser.add_argument("--device", default=_own_device(), help="where to compute")


def _own_device() -> str:
    """The GPU of this process's number among those of its machine; without one, the processor."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def check_device(options: argparse.Namespace) -> None:
    """Check that the device can be used, where the command has one.

    Args:
        options: what was typed.

    Raises:
        ValueError: where it cannot.
    """
    name = getattr(options, "device", "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # The second where torch was built without it, the last for one that holds no numbers.
        reason = str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")
        raise ValueError(
            f"--device {name} cannot be used: {reason}; --device cpu works everywhere"
        ) from error
