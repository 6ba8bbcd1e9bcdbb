"""Count again what smoothed networks certify, from the files that their authors released.

Clone the repositories named in ``RELEASED`` side by side into one folder, then

    python benchmarks/recount.py FOLDER

A file has a line for each of the 10,000 MNIST test images: its label, the class that the smoothed
network answered (-1: none) and the radius. Each radius holds with probability 0.999, from 100,000
samples of Gaussian noise an image, by what the repositories' READMEs and settings say of all of
them. The radii are printed to three digits, so that one printed as 1.58 may be as small as 1.575:
the counts of radii that are at least, and that are more than the one asked for, enclose the true
one. With ``--record NAME`` the images of one of the book's networks for MNIST are compared one by
one.

Each file is known by the hash that git gives its content; the files themselves are not ours to
spread.
"""

import argparse
import csv
import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from crcbook.checkpoints import read_json, write_json
from crcbook.experiments import decode_bits, decode_radii, paired

RECORDS = Path(__file__).parents[1] / "book" / "results"
RADII = (0.5, 1.0, 1.5, 1.58, 2.0)
SAMPLES, FAILURE = 100_000, 0.001


@dataclass(frozen=True)
class Released:
    """A file of certified radii.

    Attributes:
        method: what trained the network.
        dataset: whose test images it was certified on.
        sigma: the standard deviation of the noise.
        repository: where it is.
        path: the file's place there.
        blob: git's hash of the content that was counted.
    """

    method: str
    dataset: str
    sigma: float
    repository: str
    path: str
    blob: str


_CATRS, _CONSISTENCY, _SMOOTHMIX = (
    "alinlab/smoothing-catrs", "jh-jeong/smoothing-consistency", "jh-jeong/smoothmix",
)  # fmt: skip
RELEASED = (
    Released(
        "CAT-RS",
        "mnist",
        0.25,
        _CATRS,
        "data/mnist/noise_0.25/noise_0.25.tsv",
        "d40c57f7a542c693dce24173abea453e66aa95d4",
    ),
    Released(
        "CAT-RS",
        "mnist",
        0.5,
        _CATRS,
        "data/mnist/noise_0.5/noise_0.5.tsv",
        "9d1723af02e20ca5b4a290a731a3069fcc7f20cf",
    ),
    Released(
        "CAT-RS",
        "mnist",
        1.0,
        _CATRS,
        "data/mnist/noise_1.0/noise_1.0.tsv",
        "e98de8746038ed3213639fd85a6715f6fc2f58ac",
    ),
    Released(
        "CAT-RS",
        "fashion-mnist",
        0.25,
        _CATRS,
        "data/fmnist/noise_0.25/cat-rs/noise_0.25.tsv",
        "8e6afeeb16cb5a582c39c3d339868e5c0c21a262",
    ),
    Released(
        "CAT-RS",
        "fashion-mnist",
        0.5,
        _CATRS,
        "data/fmnist/noise_0.5/cat-rs/noise_0.5.tsv",
        "1e50c908375b9297fb316c4b96a0c4320ce3e8ed",
    ),
    Released(
        "CAT-RS",
        "fashion-mnist",
        1.0,
        _CATRS,
        "data/fmnist/noise_1.0/cat-rs/noise_1.0.tsv",
        "3f4fd783e43349e88abf898db46be674576171d1",
    ),
    Released(
        "SmoothAdv",
        "fashion-mnist",
        0.5,
        _CATRS,
        "data/fmnist/noise_0.5/salman/noise_0.5.tsv",
        "c6f046ac0faccd83b858975b29386168a2afa08a",
    ),
    Released(
        "consistency",
        "mnist",
        0.5,
        _CONSISTENCY,
        "data/certify/mnist/consistency/cohen/num_4/lbd_5.0/eta_0.5/noise_0.50_0",
        "271d48ecb7f51e473b398ab77db4b6fe9edbcf18",
    ),
    Released(
        "SmoothAdv + consistency",
        "mnist",
        0.5,
        _CONSISTENCY,
        "data/certify/mnist/consistency/salman_255.0_10_10/num_4/lbd_1.0/eta_0.5/noise_0.50_1",
        "d9847f21fe6e1b1f3e363b03179800fbac8d9de3",
    ),
    Released(
        "SmoothAdv + consistency",
        "mnist",
        0.5,
        _CONSISTENCY,
        "data/certify/mnist/consistency/salman_255.0_10_10/num_4/lbd_1.0/eta_0.5/noise_0.50_2",
        "04d11c5de82b90d765758528cca8f636adbfaffa",
    ),
    Released(
        "SmoothAdv + consistency",
        "mnist",
        0.5,
        _CONSISTENCY,
        "data/certify/mnist/consistency/salman_255.0_10_10/num_4/lbd_1.0/eta_0.5/noise_0.50_3",
        "a67c07b9e7c5b7e2bcb4aa18ff37105fb2e0d5f6",
    ),
    Released(
        "SmoothAdv + consistency",
        "mnist",
        0.5,
        _CONSISTENCY,
        "data/certify/mnist/consistency/salman_255.0_10_10/num_4/lbd_1.0/eta_0.5/noise_0.50_4",
        "a7acea579fc8e25ddb476c584fbdb9a00a295f9f",
    ),
    Released(
        "SmoothAdv + consistency",
        "mnist",
        0.5,
        _CONSISTENCY,
        "data/certify/mnist/consistency/salman_255.0_10_10/num_4/lbd_1.0/eta_0.5/noise_0.50_5",
        "26c378c29c631f3f8a005589d06e9b63caa2e5a4",
    ),
    Released(
        "SmoothMix",
        "mnist",
        0.25,
        _SMOOTHMIX,
        "data/certify/mnist/smoothmix/smix_1.0_2_m0/tau_5.0/num_4/22/noise_0.25",
        "c0ec0b5adc0b9548885288b86359255d08f92cd5",
    ),
    Released(
        "SmoothMix",
        "mnist",
        0.5,
        _SMOOTHMIX,
        "data/certify/mnist/smoothmix/smix_1.0_4_m1/tau_1.0/num_4/24/noise_0.5",
        "bb2827c5cfcc38f56f99ed4395d7212fffe5cedd",
    ),
)


def read_radii(path: Path) -> Tensor:
    """The certified radii of a released file.

    Args:
        path: tab-separated text with the columns ``idx``, ``radius`` and ``correct``.

    Returns:
        ``(images,)`` float64 radii as they are printed, -1 where the answer was wrong or none.

    Raises:
        ValueError: where the images are not those from the first to the last, each once.
    """
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    if [int(line["idx"]) for line in lines] != list(range(len(lines))):
        raise ValueError(f"{path} does not hold each image once, from the first to the last")
    radii = [float(line["radius"]) if int(line["correct"]) else -1.0 for line in lines]
    return torch.tensor(radii, dtype=torch.float64)


def git_hash(path: Path) -> str:
    """The hash by which git knows a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def counts(radii: Tensor) -> dict:
    """How many images are certified at each of ``RADII``."""
    return {
        "images": len(radii),
        "correct": int((radii >= 0).sum()),
        "at least": {f"{radius:g}": int((radii >= radius).sum()) for radius in RADII},
        "more than": {f"{radius:g}": int((radii > radius).sum()) for radius in RADII},
    }


def compared(radii: Tensor, record: dict) -> dict:
    """A record against a released file, image by image, at the record's radius.

    A record without the bits of its certified images counts by its radii, which are global
    curvature's.
    """
    radius, images = record["radius"], record["images"]
    if "bits" in record:
        ours, kind = decode_bits(record["bits"]["certified"], images), "any certificate"
    else:
        ours, kind = decode_radii(record["radii"]) >= radius, "global curvature"
    pairs = {"at least": radii >= radius, "more than": radii > radius}
    return {"ours": kind} | {name: asdict(paired(ours, theirs)) for name, theirs in pairs.items()}


def recount(folder: Path, record: dict | None = None) -> list[dict]:
    """Count every released file again.

    Args:
        folder: of the clones.
        record: one of the book's, to compare with the files of its dataset.

    Returns:
        A row a file.

    Raises:
        ValueError: where a file is not the one that was counted, or the record's images do not
            stand in the published order.
    """
    if record and record["dataset"] != "mnist":
        raise ValueError(
            "only records of mnist are compared image by image: those of Fashion-MNIST were made "
            "from a copy whose images stand in another order than the published one"
        )
    rows = []
    for released in RELEASED:
        path = folder / released.repository.split("/")[1] / released.path
        if (found := git_hash(path)) != released.blob:
            raise ValueError(f"{path} has git's hash {found}, not {released.blob}")
        radii = read_radii(path)
        row = asdict(released) | {"samples": SAMPLES, "failure": FAILURE} | counts(radii)
        if record and released.dataset == "mnist":
            row["paired"] = {"record": record["name"]} | compared(radii, record)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Count and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the clones")
    parser.add_argument("--record", metavar="NAME", help="one of book/results to compare with")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    record = options.record and read_json(RECORDS / f"{options.record}.json")
    rows = recount(options.folder, record)
    print(f"{'method, sigma':40}" + "".join(f"{radius:>8g}" for radius in RADII))
    for row in rows:
        name = f"{row['dataset']}, {row['method']}, {row['sigma']:g}"
        print(f"{name:40}" + "".join(f"{count:8}" for count in row["at least"].values()))
        print(f"{'    more than':40}" + "".join(f"{n:8}" for n in row["more than"].values()))
        for bound in ("at least", "more than") if "paired" in row else ():
            found = row["paired"][bound]
            print(f"    {bound} {record['radius']:g}: ours alone {found['first']}, theirs alone "
                  f"{found['second']}, p = {found['p_value']:.3g}")  # fmt: skip
    if options.json:
        command = "python benchmarks/recount.py FOLDER"
        command += f" --record {options.record}" if options.record else ""
        write_json(options.json, {"command": command, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
