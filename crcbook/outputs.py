"""Places where results go: checked before the work, and one process at a time."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


def check_writable(path: Path) -> None:
    """Check that a file can be written, before the work whose result it is to hold.

    Args:
        path: the file; its folder is created.

    Raises:
        RuntimeError: where it cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder, and must be a file")
        if path.parent.is_file():
            raise NotADirectoryError(f"{path.parent} is a file, and must be a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise RuntimeError(f"cannot write {path} ({reason}): name another place") from error


def check_new(path: Path) -> None:
    """Check that a file can be written, and that none is there: it may have taken hours.

    Args:
        path: the file; its folder is created.

    Raises:
        RuntimeError: where it cannot be written.
        ValueError: where it exists.
    """
    check_writable(path)
    if path.exists():
        raise ValueError(f"{path} exists already: name another file, or delete it to begin anew")


def check_same_question(path: Path, known: object, asked: dict) -> None:
    """Check that what a file answers is what is asked, so that it may be gone on with or replaced.

    Args:
        path: the file.
        known: what it says of its question; None where it is none of crcbook's.
        asked: the question, of what JSON can hold.

    Raises:
        ValueError: where it is another one.
    """
    named, asked = known if isinstance(known, dict) else {}, json.loads(json.dumps(asked))
    differing = [key for key, value in asked.items() if named.get(key) != value]
    if differing:
        how = "exists, and is not as this command wrote it"
        if asked.keys() & named.keys():
            how = f"answers another question (its {', '.join(differing)} differs)"
        raise ValueError(f"{path} {how}: name another file, or delete it to begin anew")


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep a folder, or a file that is being written, to one process.

    The system keeps the lock, on a hidden file, and frees it when the process ends in whatever way.

    Args:
        path: the folder, or the file.
        wait: for the process that has it, in place of an error.

    Yields:
        Nothing.

    Raises:
        RuntimeError: where another process has it, or the lock cannot be written.
    """
    lock_path = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(
            f"another process works in {path}: wait for it to end, or name another place"
        ) from error
    except OSError as error:
        raise RuntimeError(f"cannot write {lock_path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        # Removed while it is held: who opened it meanwhile finds that it has no name any more.
        with suppress(OSError):
            lock_path.unlink()
        lock.release()
