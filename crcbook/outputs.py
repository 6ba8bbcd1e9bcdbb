"""Places where results go: checked before the work, and one process at a time."""

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
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise RuntimeError(f"cannot write {path} ({reason}): name another place") from error


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
