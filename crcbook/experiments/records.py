"""Records: JSON files with the figures, the radii, and everything a figure depends on."""

import base64
import hashlib
import platform
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import crcbook
from crcbook.checkpoints import read_json
from crcbook.training import knows_bfloat16

PACKAGE = Path(crcbook.__file__).resolve().parent
RADIUS_UNIT = 1e-4  # of the recorded radii, in the units of the input


def load_records(folder: Path | str) -> dict[str, dict]:
    """Read the records of a folder.

    Args:
        folder: where :func:`reproduce` wrote them.

    Returns:
        Records by name.

    Raises:
        RuntimeError: where one cannot be read.
    """
    return {path.stem: read_json(path) for path in sorted(Path(folder).glob("*.json"))}


def encode_radii(radius: Tensor) -> str:
    """Radii in two bytes each, rounded down to ``RADIUS_UNIT``.

    Args:
        radius: ``(items,)``; what is above 65535 units, infinity too, counts as that many.

    Returns:
        Base64 text of little-endian integers.
    """
    units = (radius / RADIUS_UNIT).floor().clamp(max=65535).numpy().astype("<u2")
    return base64.b64encode(units.tobytes()).decode()


def decode_radii(text: str) -> Tensor:
    """What :func:`encode_radii` encoded.

    Args:
        text: a record's ``radii``.

    Returns:
        ``(items,)`` float64 radii.
    """
    units = base64.b64decode(text)
    return torch.from_numpy(np.frombuffer(units, "<u2").astype("f8")) * RADIUS_UNIT


def certified_shares(record: dict, distances: np.ndarray) -> np.ndarray:
    """The shares of a record's images that global curvature certifies so far.

    Args:
        record: what :func:`load_records` has of an experiment.
        distances: l2 radii, at least 0.

    Returns:
        A share for each distance; at 0 the clean accuracy.
    """
    radii = np.sort(decode_radii(record["radii"]).numpy())
    shares = 1 - np.searchsorted(radii, distances) / len(radii)
    return np.where(distances > 0, shares, record["clean_accuracy"])


def encode_bits(column: Tensor) -> str:
    """Yes or no for each item, in a bit each.

    Args:
        column: ``(items,)`` bool.

    Returns:
        Base64 text of the bits, the first item's the highest of the first byte.
    """
    return base64.b64encode(np.packbits(column.numpy()).tobytes()).decode()


def decode_bits(text: str, items: int) -> Tensor:
    """What :func:`encode_bits` encoded.

    Args:
        text: a column of a record's ``bits``.
        items: how many there are: a record's ``images``.

    Returns:
        ``(items,)`` bool.
    """
    packed = np.frombuffer(base64.b64decode(text), "u1")
    return torch.from_numpy(np.unpackbits(packed, count=items).astype(bool))


def environment(device: str) -> dict:
    """What a figure depends on beside its command.

    Args:
        device: the torch device used.

    Returns:
        Versions, the device's name, the time and, in a checkout, the commit.
    """
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": name,
        "bfloat16": knows_bfloat16(device),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the checkout the package belongs to, which is not any that it happens to lie in."""
    git = partial(subprocess.run, cwd=PACKAGE, capture_output=True, text=True, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", "."])
        return git(["git", "describe", "--always", "--dirty", "--abbrev=12"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def digest(paths: list[Path]) -> str:
    """The SHA-256 of files, one after the other.

    Args:
        paths: the files.

    Returns:
        Hexadecimal digits.
    """
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
