"""What a device is asked before its figures are believed, and the headline network on it.

    python benchmarks/gpu.py --json book/results/benchmarks/gpu.json

1. Are products of matrices as exact as the proofs take them to be? Whole numbers, multiplied
   exactly beside it, tell.
2. The headline recipe is trained with several seeds, and 10,000 test images are certified and
   attacked: figures and seconds. A further seed is begun only where the last one's time is left.
3. The device's verdicts and radii against the CPU's: neither may certify what the other proves to
   be misclassified.
4. For a minute, random networks are certified and attacked, as in ``make soundness``.

It takes at most about eight minutes on one large GPU; ``--quick`` is the same in small, on the
digits, for a processor. The exit status is 1 where anything above is found wrong.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from soundness import COSTLY, SETTINGS, challenge, random_cases, thin_cases
from torch import Tensor, nn

import crcbook as crc
from crcbook.checkpoints import write_json
from crcbook.datasets import Split
from crcbook.experiments import (
    Experiment,
    drawn_anew,
    environment,
    evaluate,
    experiments,
    run_training,
    summary,
)
from crcbook.proof.arithmetic import DOUBLE, SINGLE, single_sums_hold

HEADLINE, SMALL = "mnist-2-softplus-crt", "digits-2-softplus-crt"
PRODUCTS = {
    "matrix @ matrix": torch.matmul,
    "addmm": lambda a, b: torch.addmm(b.new_zeros(b.shape[1]), a, b),
    "matrix @ vector": lambda a, b: torch.stack([a @ column for column in b.T], 1),
    "vector @ matrix": lambda a, b: torch.stack([row @ b for row in a]),
    "bmm": lambda a, b: torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[1],
}
_SIZE, _ROWS = 256, 32


def probes(device: str) -> dict[str, float]:
    """The largest error of products of matrices, over what the proofs allow: at most 1.

    All entries of the first kind of matrix are just below the middle between two TF32 numbers, so
    that rounding to one of these moves every term of a sum the same way. In the second there is one
    product an entry of the result, in which all bits count.

    Args:
        device: where the products are computed.

    Returns:
        Ratios by precision and kind of product.
    """
    found = {}
    generator = torch.Generator().manual_seed(0)
    for used, bits in ((SINGLE, 24), (DOUBLE, 53)):
        left, right = (_below_the_middle(bits, size, generator) for size in (_ROWS, _SIZE))
        draw = torch.randint(2 ** (bits - 1), 2**bits, (_SIZE,), generator=generator)
        for terms, second in ((_SIZE, right), (1, draw.diag())):
            exact = left.numpy().astype(object) @ second.numpy().astype(object)
            for name, product in PRODUCTS.items():
                result = product(*(part.to(device, used.dtype) for part in (left, second)))
                error = _largest_error(result, exact) / used.gamma(terms)
                name = f"{str(used.dtype).removeprefix('torch.')}, {name}"
                found[name] = max(found.get(name, 0.0), round(error, 4))
    return found


def _below_the_middle(bits: int, rows: int, generator: torch.Generator) -> Tensor:
    """Whole numbers of so many bits: eleven at random, a zero, then ones."""
    top = torch.randint(2**10, 2**11, (rows, _SIZE), generator=generator)
    return (top << (bits - 11)) | (2 ** (bits - 12) - 1)


def _largest_error(result: Tensor, exact) -> float:
    """The largest relative error, of whole numbers and with no rounding of its own to speak of."""
    pairs = zip(result.cpu().double().flatten().tolist(), exact.flatten().tolist(), strict=True)
    return max(abs(int(found) - true) / true for found, true in pairs)


def compared(model: nn.Sequential, test: Split, radius: float, device: str) -> dict:
    """A device's certificates and verdicts against the CPU's, on the same network and items.

    Args:
        model: the network.
        test: the items.
        radius: of the verdicts.
        device: to compare with the CPU.

    Returns:
        How many verdicts differ, by how much radii do at most, and ``contradictions``: items of
        which one certifies a ball that holds an adversarial point proved by the other.
    """
    here, verdict_here = _answers(model.to("cpu"), test, radius)
    there, verdict_there = _answers(model.to(device), test, radius)
    against = sum(
        int((a.radius.cpu() > b.distance.cpu() * (1 + 1e-12)).sum())
        for a, b in ((here, there), (there, here))
    )
    difference = (here.radius - there.radius.cpu()).abs()
    return {
        "images": len(test),
        "verdicts that differ": int((verdict_here != verdict_there.cpu()).sum()),
        "largest difference of radii": difference.max().item(),
        "contradictions": against,
    }


def _answers(model: nn.Sequential, test: Split, radius: float):
    certificate = crc.certify(model, test.x, test.y, method="dual")
    return certificate, crc.verify(model, test.x, test.y, radius, method="dual").robust


def soundness(device: str, seconds: float, seed: int = 0) -> dict:
    """Challenge certificates of random networks on the device, for so many seconds.

    Args:
        device: where to certify and to attack.
        seconds: how long.
        seed: of the networks and of their order.

    Returns:
        How many certificates were challenged, and broken.
    """
    found, until = {"certificates": 0, "violations": 0}, time.monotonic() + seconds
    cases = [*thin_cases(seed), *random_cases(seed)]
    random.Random(seed).shuffle(cases)
    for (_, model, x), (setting, options) in _turns(cases):
        part = x[:COSTLY] if "local" in setting or setting == "crown" else x
        figures = challenge(model.to(device), part.to(device), options, restarts=2, seed=seed)
        for name in found:
            found[name] += int(figures[name])
        if time.monotonic() > until:
            break
    return found


def _turns(cases: list) -> Iterator[tuple]:
    """Each network with one setting, then each with the next one."""
    settings = list(SETTINGS.items())
    for turn in range(len(settings)):
        for place, case in enumerate(cases):
            yield case, settings[(place + turn) % len(settings)]


def trained(experiment: Experiment, runs: Path, device: str) -> tuple[nn.Sequential, dict]:
    """Train a network, certify and attack all test images, and time it.

    Args:
        experiment: what to train.
        runs: the folder of the trainings.
        device: where to run.

    Returns:
        The network and its figures.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "train"):
        model, facts = run_training(experiment, runs / f"seed-{experiment.seed}", device)
    test, radius = crc.load(experiment.dataset).test, experiment.recipe.radius
    with _timed(seconds, "certify"):
        crc.certify(model, test.x, test.y, method="dual")
    with _timed(seconds, "verify"):
        crc.verify(model, test.x, test.y, radius, method="dual")
    with _timed(seconds, "evaluate"):
        figures = summary(evaluate(model, test, radius, local=True), radius)
    figures |= {"seed": experiment.seed, "validation": facts["validation"], "seconds": seconds}
    return model, figures | {"seconds_an_epoch": facts["seconds_an_epoch"]}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long a block takes; a device may lag behind its program."""
    started = time.monotonic()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = round(time.monotonic() - started, 2)


def ask(options: argparse.Namespace, runs: Path) -> dict:
    """Ask for everything, and print what came."""
    started, device, record = time.monotonic(), options.device, {}

    def note(name: str, value) -> None:
        record[name] = value
        print(f"{name}: {value}", flush=True)

    note("environment", environment(device))
    note("single_sums_hold", single_sums_hold(torch.device(device)))
    note("probes", probes(device))
    profile, name, images = ("quick", SMALL, 60) if options.quick else ("full", HEADLINE, 500)
    experiment, networks = experiments(profile)[name], []
    for seed in options.seeds:
        before = time.monotonic()
        model, figures = trained(replace(drawn_anew(experiment, seed), box=False), runs, device)
        networks.append(figures)
        note(f"seed {seed}", figures)
        if seed == options.seeds[0]:
            test = crc.load(experiment.dataset).test.take(slice(0, images))
            note("compared", compared(model, test, experiment.recipe.radius, device))
            note("soundness", soundness(device, options.soundness))
            before += options.soundness
        if 2 * time.monotonic() - before - started > 60 * options.minutes:
            break
    record = {key: value for key, value in record.items() if not key.startswith("seed ")}
    record |= {"experiment": name, "networks": networks}
    return record | {"seconds": round(time.monotonic() - started, 1)}


def wrong(record: dict) -> list[str]:
    """What a record says against the device."""
    found = [f"{name}: {ratio}" for name, ratio in record["probes"].items() if ratio > 1]
    found += [] if record["single_sums_hold"] else ["float32 sums are not float32"]
    found += ["a contradiction"] if record["compared"]["contradictions"] else []
    broken = [record["soundness"], *record["networks"]]
    return found + ["a broken certificate" for row in broken if row["violations"]]


def main(arguments: list[str] | None = None) -> int:
    """Ask for everything and write a record; the status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=own)
    parser.add_argument("--quick", action="store_true", help="in small, on the digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=8, help="that all of it may take")
    parser.add_argument("--soundness", type=float, default=60, help="seconds of attacks")
    parser.add_argument("--runs", type=Path, help="keep the trainings here, and resume them")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = ask(options, options.runs or Path(folder))
    record["command"] = " ".join(["python benchmarks/gpu.py", *(["--quick"] * options.quick)])
    if options.json:
        write_json(options.json, record)
    for line in wrong(record):
        print("WRONG:", line)
    return int(bool(wrong(record)))


if __name__ == "__main__":
    sys.exit(main())
