"""One network at several radii: ``python benchmarks/other_radii.py NETWORK --dataset mnist``.

A record of ``reproduce`` has local certificates for the radius that the network was trained for.
Here they are asked for at others, of the test images that global curvature leaves open and our
attack does not move.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

import crcbook as crc
from crcbook.checkpoints import write_json
from crcbook.datasets import Split
from crcbook.experiments import environment, evaluate
from crcbook.experiments.evaluation import ATTACK

RADII, TOGETHER = (0.5, 1.0, 1.5, 1.58), 100


def at_radius(model: nn.Module, items: Split, radius: float) -> dict[str, int]:
    """How many items are certified at a radius by each kind, and how many an attack leaves.

    Args:
        model: what :func:`crcbook.load_model` returned.
        items: the images and their labels.
        radius: of the balls.

    Returns:
        The counts, of all items, and of the images that are certified and moved, which is 0.
    """
    counts = {"global": 0, "local": 0, "survived": 0, "violations": 0}
    for start in range(0, len(items), TOGETHER):
        part = items.take(slice(start, start + TOGETHER))
        found = evaluate(model, part, radius, box=False, local=True)
        proved, kept = found["certified"], found["survived"]
        counts["global"] += int((found["radius"] >= radius).sum())
        counts["local"] += int(proved.sum())
        counts["survived"] += int(kept.sum())
        counts["violations"] += int((proved & ~kept).sum())
    return counts


def main(arguments: list[str] | None = None) -> int:
    """Certify, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", type=Path, help="model.safetensors of a run")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--radii", type=float, nargs="+", default=RADII)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    model = crc.load_model(options.network)
    items = crc.load(options.dataset).test.take(slice(0, options.images))
    rows = {}
    print(f"{'radius':>8}{'global':>10}{'local':>10}{'survived':>10}{'seconds':>10}")
    for radius in options.radii:
        started = time.time()
        row = at_radius(model, items, radius)
        row["seconds"] = round(time.time() - started, 1)
        rows[f"{radius:g}"] = row
        shown = (row[name] for name in ("global", "local", "survived", "seconds"))
        print(f"{radius:8g}" + "".join(f"{value:10}" for value in shown), flush=True)
        if options.json:
            command = f"python benchmarks/other_radii.py {options.network.name}"
            command += f" --dataset {options.dataset}"
            command += f" --images {options.images}" if options.images else ""
            asked = {"dataset": options.dataset, "images": len(items), "attack": ATTACK}
            about = {"environment": environment("cpu"), "command": command}
            write_json(options.json, {"rows": rows} | asked | about)
    return 1 if any(row["violations"] for row in rows.values()) else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
