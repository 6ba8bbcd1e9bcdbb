"""This checkout beside another one: ``python benchmarks/versions.py OTHER --network FILE``.

The same questions about the same network, asked as each version asks them by default, in turn, each
in a process of its own: the processor's seconds, and how many images each certifies. Every figure
of a row is of one run. A deeper network is made of the one given, by ``deepen``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
TURNS = 3


def ask(network: Path, dataset: str, images: int, radius: float) -> dict[str, dict[str, float]]:
    """Ask the version that is imported here.

    Args:
        network: a ``.safetensors`` file of a network with one hidden layer.
        dataset: whose test images.
        images: how many of them.
        radius: that is asked about.

    Returns:
        For each question the processor's ``seconds`` and the number of images ``certified``. What
        is prepared once a network is prepared before.
    """
    import torch

    import crcbook as crc
    from crcbook.experiments import evaluate
    from crcbook.networks import deepen

    torch.set_num_threads(1)
    model, items = crc.load_model(network), crc.load(dataset).test
    test, few = (items.take(slice(0, count)) for count in (images, -(-images // 10)))
    unit = {"radius": radius, "box": (0.0, 1.0)}
    questions = {
        "certify": lambda some: crc.certify(model, some.x, some.y).radius >= radius,
        "verify": lambda some: crc.verify(model, some.x, some.y, radius).robust,
        "verify, local": lambda some: (
            crc.verify(model, some.x, some.y, radius, curvature="local").robust
        ),
        "verify, local in the box": lambda some: (
            crc.verify(model, some.x, some.y, **unit, curvature="local").robust
        ),
    }
    for layers in (3, 4):
        deeper = deepen(model, layers)
        questions[f"evaluate, {layers} layers, local and box"] = lambda some, deeper=deeper: (
            evaluate(deeper, some, radius, box=True, local=True)["certified_box"]
        )
    found = {}
    for name, question in questions.items():
        asked = few if "layers" in name else test
        question(items.take(slice(len(items) - 8, len(items))))
        started = time.process_time()
        certified = int(question(asked).sum())
        seconds = time.process_time() - started
        found[name] = {"images": len(asked), "seconds": seconds, "certified": certified}
    return found


def compare(other: Path, arguments: list[str], turns: int = TURNS) -> dict[str, dict[str, float]]:
    """Ask both versions in turn.

    Args:
        other: a checkout of another version.
        arguments: the words that :func:`ask` is called with, as a command line has them.
        turns: how often each is asked; the medians of the seconds count.

    Returns:
        For each question the seconds and the numbers of certified images of both.
    """
    runs: dict[str, list[dict]] = {"other": [], "here": []}
    for _ in range(turns):
        for name, checkout in (("other", other), ("here", HERE)):
            command = [sys.executable, __file__, "--ask", *arguments]
            environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
            answer = subprocess.run(
                command, env=environment, cwd=checkout, check=True, stdout=subprocess.PIPE
            )
            runs[name].append(json.loads(answer.stdout.splitlines()[-1]))
    rows = {}
    for question in runs["here"][0]:
        row: dict[str, float] = {"images": runs["here"][0][question]["images"]}
        for name, answers in runs.items():
            row[f"seconds, {name}"] = round(
                statistics.median(answer[question]["seconds"] for answer in answers), 3
            )
            row[f"certified, {name}"] = answers[0][question]["certified"]
        row["seconds, here over other"] = round(row["seconds, here"] / row["seconds, other"], 3)
        rows[question] = row
    return rows


def main() -> None:
    """Print a row a question, and write them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, nargs="?", help="a checkout of another version")
    parser.add_argument("--network", type=Path,
        default=HERE / "book" / "results" / "mnist-2-softplus-crt-long.safetensors")  # fmt: skip
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--radius", type=float, default=1.58)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    network = options.network.resolve()
    if options.ask:
        print(json.dumps(ask(network, options.dataset, options.images, options.radius)))
        return
    if options.other is None:
        parser.error("name a checkout of another version, such as one of git worktree")
    words = ["--network", str(network), "--dataset", options.dataset]
    words += ["--images", str(options.images), "--radius", str(options.radius)]
    rows = compare(options.other.resolve(), words, options.turns)
    for question, row in rows.items():
        print(f"{question:38} " + "  ".join(f"{name} {value:g}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
