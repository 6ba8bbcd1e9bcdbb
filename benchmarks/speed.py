"""Time certificates against the published schedule, in one run: ``make bench``.

The published method (Singla & Feizi 2020) bisects the dual variable 30 times with 20 gradient steps
each, in float32, for the runner-up class of every image; ours proves a float64 radius against all
classes. Both see the same images of the same network, part by part and in turns, and of five turns
the fastest counts: what else the machine does meets both alike. Figures are seconds and ratios on
this machine; the set-up, every pair's curvature and what a first call prepares, is a network's and
not an image's, and is shown apart.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

import crcbook as crc
from crcbook.checkpoints import write_json
from crcbook.experiments import environment
from crcbook.networks import read_network

PART, TURNS = 1000, 5  # items at a time, and how often each


def published(model, x, y) -> torch.Tensor:
    """The dual radius by the published schedule, against the runner-up only, not rounded."""
    network = read_network(model).to(torch.float32)
    x = x.flatten(1)
    target = network.logits(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    low_curvature, high_curvature = (
        bound.float() for bound in crc.curvature_bounds(model, y, target)
    )
    low, high = torch.zeros_like(low_curvature), -1 / low_curvature
    point = x.clone()
    for _ in range(30):
        eta = (low + high) / 2
        step = 1 / (1 + eta * high_curvature)
        for _ in range(20):
            margin, gradient = network.margin_and_gradient(point, y, target)
            point = point - step[:, None] * (point - x + eta[:, None] * gradient)
        inside = margin > 0
        low, high = torch.where(inside, eta, low), torch.where(inside, high, eta)
    return (point - x).norm(dim=1)


def in_chunks(function, x, y, size=512):
    """Apply a function to the items in chunks."""
    parts = zip(x.split(size), y.split(size), strict=True)
    return torch.cat([function(*part) for part in parts])


def timed(function) -> float:
    """The seconds a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turns(calls: dict, test, old, few: int) -> tuple[dict[str, float], float]:
    """Seconds of each call on all items, and an item of the old one on the first few of a part."""
    seconds, slow, seen = dict.fromkeys(calls, 0.0), 0.0, 0
    for start in range(0, len(test), PART):
        part = test.take(slice(start, start + PART))
        some = part.take(slice(0, few * PART // len(test)))
        turns = [
            [timed(lambda: in_chunks(old, some.x, some.y))]  # noqa: B023
            + [timed(lambda: call(part.x, part.y)) for call in calls.values()]  # noqa: B023
            for _ in range(TURNS)
        ]
        best = [min(column) for column in zip(*turns, strict=True)]
        slow, seen = slow + best[0], seen + len(some)
        for name, value in zip(calls, best[1:], strict=True):
            seconds[name] += value
    return seconds, slow / seen


def main() -> int:
    """Time everything on one network and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of an MNIST run, or a .safetensors model")
    parser.add_argument("--radius", type=float, default=1.58)
    parser.add_argument("--limit", type=int, default=10_000, help="images")
    parser.add_argument("--published", type=int, default=2_000, help="images for the slow method")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    run = options.run
    model = crc.load_model(run)
    test = crc.load("mnist").test.take(slice(0, options.limit))
    pairs = torch.cartesian_prod(torch.arange(10), torch.arange(10)).T
    setup = timed(lambda: crc.curvature_bounds(model, *pairs))
    setup += timed(lambda: crc.certify(model, test.x[:1], test.y[:1], method="dual"))
    radius, few = options.radius, min(options.published, len(test))
    calls = {
        "verify, all classes": lambda x, y: crc.verify(model, x, y, radius, method="dual"),
        "certify, all classes": lambda x, y: crc.certify(model, x, y, method="dual"),
        "certify, runner-up": lambda x, y: crc.certify(
            model, x, y, targets="runner-up", method="dual"
        ),
        "verify, runner-up": lambda x, y: crc.verify(
            model, x, y, radius, targets="runner-up", method="dual"
        ),
    }
    seconds, old = in_turns(calls, test, lambda x, y: published(model, x, y), few)
    print(f"set-up: {setup:.2f} s")
    print(f"published schedule, runner-up: {1e3 * old:.2f} ms an image")
    print(f"{'':24}{'ms an image':>12}{'faster':>9}{'with set-up':>13}")
    whole, figures = old * len(test), {}
    for name, value in seconds.items():
        figures[name] = {
            "ms an image": round(1e3 * value / len(test), 3),
            "times faster": round(whole / value, 1),
            "times faster, with set-up": round(whole / (value + setup), 1),
        }
        print(f"{name:24}{figures[name]['ms an image']:12.3f}{figures[name]['times faster']:9.1f}"
              f"{figures[name]['times faster, with set-up']:13.1f}")  # fmt: skip
    for name in ("verify", "certify"):
        ratio = seconds[f"{name}, all classes"] / seconds[f"{name}, runner-up"]
        print(f"{name}: all classes take {ratio:.2f} x the time of the runner-up alone")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    if options.json:
        record = {
            "rows": figures,
            "set-up, s": round(setup, 2),
            "published, ms an image": round(1e3 * old, 2),
            "published, images": few,
            "images": len(test),
            "network": run.name.removesuffix(".safetensors"),
            "environment": environment("cpu"),
            "command": f"python benchmarks/speed.py {run} --json {options.json}",
        }
        write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
