"""Write proofs of test images and have the checker decide: ``python benchmarks/proofs.py MODEL``.

Part by part, images are proved by the package and the proof file is checked, in balls, by the
program that shares nothing with it. What is done is kept below ``--runs``, so that the same command
goes on where it stopped. Seconds are those of the processor.
"""

import argparse
import hashlib
import json
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import crcbook as crc
from crcbook.checkpoints import read_json, write_json
from crcbook.experiments import environment
from crcbook.networks import deepen
from crcbook.proof_file import prove
from crcbook_checker import check

CHECKER = Path(check.__file__)
PART = 25  # images a proof file


def seconds_of(action) -> tuple[object, float]:
    """What a call returns, and the processor's seconds it takes."""
    started = time.process_time()
    found = action()
    return found, time.process_time() - started


def kept(path: Path, find) -> dict:
    """The facts in a file, found and written where there is none yet."""
    if not path.exists():
        write_json(path, find())
    return json.loads(path.read_text())


def curvatures(network: check.Network, local: bool) -> dict:
    """Prove for every two classes what is the network's alone; its cache keeps that.

    It is k over all of R^n; for balls, the largest eigenvalue that they share. (Where a claim of
    local curvature rests on k over all of R^n, its time counts as the image's.)
    """
    classes = len(network.layers[-1].rows)
    pairs = [(label, target) for label in range(classes) for target in range(classes)]
    zero, everywhere = check.arb(0), check.arb("inf")
    seconds = 0.0
    for pair in (pair for pair in pairs if pair[0] != pair[1]):
        find = (
            partial(network.in_ball, *pair, network.line)
            if local
            else partial(network.bound, *pair, zero, [], everywhere, [])
        )
        seconds += seconds_of(find)[1]
    return {"pairs": len(pairs) - classes, "seconds": seconds}


def proved_and_checked(
    model, network: check.Network, data, index: torch.Tensor, curvature: str, path: Path
) -> dict:
    """Write the proofs of some images, and what the checker says of each."""
    write = partial(prove, model, data.x[index], data.y[index], path, curvature, index)
    written, writing = seconds_of(write)
    x = data.x.flatten(1).double().numpy()
    judge = partial(check.check, check.Proofs(path), network, x, data.y.numpy())
    found, checking = seconds_of(lambda: list(judge()))
    claimed = written.radius > 0
    lost = 1 - written.radius[claimed] / written.certified[claimed]
    return {
        "summary": written.summary,
        "claimed": int(claimed.sum()),
        "proved": sum(not wrong for *_, wrong in found),
        "not proved": {index: wrong for index, _, _, wrong in found if wrong},
        "lost": sorted(lost.tolist()),
        "bytes": path.stat().st_size,
        "seconds to prove": writing,
        "seconds to check": checking,
    }


def total(parts: list[dict]) -> dict:
    """The figures of a record: the sums of the parts that :func:`proved_and_checked` found."""
    keys = dict.fromkeys(key for part in parts for key in part["summary"])
    summary = {key: sum(part["summary"].get(key, 0) for part in parts) for key in keys}
    claimed, images = sum(part["claimed"] for part in parts), summary["images"]
    lost = np.array([value for part in parts for value in part["lost"]] or [np.nan])
    return {
        "summary": summary,
        "images claimed": claimed,
        "images proved": sum(part["proved"] for part in parts),
        "not proved": {key: wrong for part in parts for key, wrong in part["not proved"].items()},
        "radius lost, relative": {"median": np.median(lost), "largest": lost.max()},
        "KB an image": sum(part["bytes"] for part in parts) / max(claimed, 1) / 1000,
        "CPU seconds an image to prove": sum(part["seconds to prove"] for part in parts) / images,
        "CPU seconds an image to check": sum(part["seconds to check"] for part in parts) / images,
    }


def main(arguments: list[str] | None = None) -> int:
    """Prove, check, and return 0 if every claim is proved, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a .safetensors model of crcbook, of a run too")
    parser.add_argument("--dataset", default="mnist", help="whose test images")
    parser.add_argument("--curvature", choices=("global", "local"), default="global")
    parser.add_argument("--layers", type=int, help="make it as deep first, by layers that copy")
    parser.add_argument("--images", type=int, help="how many; all where not given")
    parser.add_argument("--seed", type=int, help="draw them at random, in place of the first ones")
    parser.add_argument("--runs", type=Path, default=Path("runs/proofs"), help="what is done")
    parser.add_argument("--json", type=Path, help="write a record here")
    options = parser.parse_args(arguments)
    model, test = crc.load_model(options.model), crc.load(options.dataset).test
    name = options.model.parent.name if options.model.stem == "model" else options.model.stem
    if options.layers:
        model, name = deepen(model, options.layers), f"{name}-deepened-{options.layers}"
    count = min(options.images or len(test), len(test))
    index = torch.arange(count)
    if options.seed is not None:
        generator = torch.Generator().manual_seed(options.seed)
        index = torch.randperm(len(test), generator=generator)[:count]
    checker = hashlib.sha256(CHECKER.read_bytes()).hexdigest()
    asked = f"{name}-{options.dataset}-{options.curvature}-{options.seed}"
    folder = options.runs / f"{asked}-{checker[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    crc.save_model(folder / "model.safetensors", model)
    network = check.Network.read(folder / "model.safetensors", None, folder / "cache.json")
    local = options.curvature == "local" and len(network.layers) > 2
    prepared = kept(folder / "curvatures.json", lambda: curvatures(network, local))
    parts = []
    for place, some in enumerate(index.split(PART)):
        path = folder / f"{place}-{len(some)}.safetensors"
        find = partial(proved_and_checked, model, network, test, some, options.curvature, path)
        parts.append(kept(path.with_suffix(".json"), find))
        path.unlink(missing_ok=True)
        print(f"{parts[-1]['proved']} of {parts[-1]['claimed']} images proved", flush=True)
    run = options.model.with_name("run.json")
    record = {
        "network": name,
        "trained": read_json(run)["recipe"] if run.exists() else None,
        "dataset": options.dataset,
        "curvature": options.curvature,
        **total(parts),
        f"curvatures {'in any ball' if local else 'over all of R^n'}": prepared["pairs"],
        "CPU seconds to prove these": prepared["seconds"],
        "checker": {"sha256": checker, "python-flint": version("python-flint")},
        "environment": environment("cpu"),
        "command": " ".join(["python benchmarks/proofs.py", *map(str, arguments or sys.argv[1:])]),
    }
    print(json.dumps(record, indent=1))
    if options.json:
        write_json(options.json, record)
    return int(record["images proved"] < record["images claimed"])


if __name__ == "__main__":
    sys.exit(main())
