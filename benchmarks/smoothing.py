"""A rival that gives up the network: ``python benchmarks/smoothing.py --dataset mnist``.

The architecture of the headline, trained on noisy images and certified as the procedure of Cohen,
Rosenfeld & Kolter (2019) does: of many noisy copies of an image the share that get one class, and
its lower confidence bound by Clopper and Pearson, give a radius for the vote. It holds with
probability 1 - alpha an image, over the copies drawn, and says nothing of the network itself. The
noise is chosen on validation images, for the radius in question; the test images are certified by
networks of several seeds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor, nn

import crcbook as crc
from crcbook.checkpoints import write_json
from crcbook.datasets import Split, split_validation
from crcbook.experiments import environment

ALPHA, COPIES_TO_GUESS, AT_ONCE = 0.001, 100, 2500
RADII = (0.5, 1.0, 1.5, 1.58, 2.0)


def train(data: Split, classes: int, noise: float, seed: int, epochs: int, width: int) -> nn.Module:
    """Train a network of one hidden layer on noisy images.

    Args:
        data: the training items.
        classes: how many there are.
        noise: standard deviation of the noise in a pixel.
        seed: of the initialisation, the order and the noise.
        epochs: passes over the data.
        width: hidden units.

    Returns:
        The network.
    """
    model = crc.mlp([data.x[0].numel(), width, classes], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters())
    steps = -(-len(data) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs=epochs,
                                                   steps_per_epoch=steps)  # fmt: skip
    for _ in range(epochs):
        for index in torch.randperm(len(data), generator=generator).split(256):
            x = data.x[index]
            x = x + noise * torch.randn(x.shape, generator=generator)
            loss = nn.functional.cross_entropy(model(x), data.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


@torch.inference_mode()
def votes(
    model: nn.Module, x: Tensor, noise: float, copies: int, generator: torch.Generator
) -> Tensor:
    """How often each class is the answer to a noisy copy of one image.

    Args:
        model: the classifier.
        x: one image.
        noise: standard deviation of the noise in a pixel.
        copies: how many.
        generator: draws the noise.

    Returns:
        ``(classes,)`` counts.
    """
    found = torch.zeros(model(x[None]).shape[1], dtype=torch.int64)
    for start in range(0, copies, AT_ONCE):
        shape = (min(AT_ONCE, copies - start), *x.shape)
        answers = model(x + noise * torch.randn(shape, generator=generator)).argmax(1)
        found += answers.bincount(minlength=len(found))
    return found


def radius_of(hits: int, copies: int, noise: float, alpha: float = ALPHA) -> float:
    """The radius within which the vote keeps its class, with probability 1 - alpha.

    Args:
        hits: copies with that class.
        copies: how many there are.
        noise: standard deviation of the noise.
        alpha: how often the radius may be wrong.

    Returns:
        The radius of Cohen et al. (2019), theorem 1 with the second class at most the rest; 0 where
        the class may have no majority.
    """
    share = stats.binomtest(hits, copies, alternative="greater").proportion_ci(1 - alpha).low
    return noise * max(0.0, float(stats.norm.ppf(share)))


def certified(model: nn.Module, items: Split, noise: float, copies: int, seed: int) -> list[float]:
    """The radii of items, 0 where the vote is wrong or abstains.

    Args:
        model: the classifier.
        items: images and labels.
        noise: standard deviation of the noise in a pixel.
        copies: how many vote; as many as ``COPIES_TO_GUESS`` others say for which class.
        seed: of the noise.

    Returns:
        A radius an item.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for x, y in zip(items.x, items.y.tolist(), strict=True):
        guess = int(votes(model, x, noise, COPIES_TO_GUESS, generator).argmax())
        hits = int(votes(model, x, noise, copies, generator)[guess])
        found.append(radius_of(hits, copies, noise) if guess == y else 0.0)
    return found


def shares(radii: list[float]) -> dict[str, float]:
    """The share of items whose radius is at least each of ``RADII``."""
    return {f"{r:g}": statistics.fmean(radius >= r for radius in radii) for r in RADII}


def spread(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and standard deviation over the seeds, of each radius' share."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {
        key: [statistics.mean(column), statistics.stdev(column) if len(column) > 1 else 0.0]
        for key, column in columns.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Choose the noise, train, certify and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--radius", type=float, default=1.58, help="what the noise is chosen for")
    parser.add_argument("--noises", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=46, help="as many as the headline has")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--images", type=int, default=500, help="test images, from the first")
    parser.add_argument("--copies", type=int, default=10_000, help="noisy copies of an image")
    parser.add_argument("--json", type=Path, help="write a record here")
    options = parser.parse_args(arguments)
    data, started = crc.load(options.dataset), time.monotonic()
    training, validation = split_validation(data.train, min(5000, len(data.train) // 6))
    chosen, validated, models = 0.0, {}, {}
    for noise in options.noises:
        models[noise] = train(
            training, data.classes, noise, options.seeds[0], options.epochs, options.width
        )
        few = validation.take(slice(0, options.images // 2))
        # As many copies as in the test: fewer could not prove the radius of the least noise.
        radii = certified(models[noise], few, noise, options.copies, seed=0)
        validated[noise] = statistics.fmean(radius >= options.radius for radius in radii)
        chosen = max(validated, key=lambda noise: validated[noise])
        print(f"noise {noise:g}: {validated[noise]:.1%} of the validation images", flush=True)
    test, rows = data.test.take(slice(0, options.images)), []
    for seed in options.seeds:
        model = models[chosen] if seed == options.seeds[0] else train(
            training, data.classes, chosen, seed, options.epochs, options.width
        )  # fmt: skip
        radii = certified(model, test, chosen, options.copies, seed=1 + seed)
        rows.append(shares(radii))
        print(f"seed {seed}, noise {chosen:g}: {rows[-1]}", flush=True)
    record = {
        "dataset": options.dataset,
        "architecture": f"one hidden layer of {options.width} units, softplus",
        "epochs": options.epochs,
        "noise": chosen,
        "validated": {f"{noise:g}": share for noise, share in validated.items()},
        "validation images": len(few),
        "test images": len(test),
        "copies": options.copies,
        "alpha, an image": ALPHA,
        "certified, by seed": dict(zip(map(str, options.seeds), rows, strict=True)),
        "certified, mean and deviation": spread(rows),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "environment": environment("cpu"),
        "command": " ".join(["python benchmarks/smoothing.py", *(arguments or sys.argv[1:])]),
    }
    if options.json:
        write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
