"""Try to break certificates: ``make soundness``.

Random and trained networks of 2 to 5 layers, every activation, weights of many scales, in float32
and float64: each certified radius is attacked from the input, from random points and from the
certificate's nearest point. A violation is a point inside a certified ball whose margin, less the
rounding error of its float64 evaluation, is not positive.
"""

import argparse
import itertools
import sys
import time

import torch
from tqdm import tqdm

import crcbook as crc
from crcbook.attacks import boundary_points
from crcbook.minorant import Pairs, Prover
from crcbook.networks import read_network

SHAPES = ([2, 16, 3], [12, 40, 10], [6, 20, 12, 4], [8, 16, 16, 16, 5], [5, 10, 10, 10, 10, 3])
SCALES = (0.1, 1.0, 3.0, 20.0)


def random_model(shape, activation, scale, dtype, seed) -> torch.nn.Sequential:
    """A network with its weights scaled."""
    model = crc.mlp(shape, activation, seed=seed).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def trained_model(layers, activation, method, seed) -> torch.nn.Sequential:
    """A network trained for a few epochs on the bundled digits."""
    model = crc.mlp([64, *[32] * (layers - 1), 10], activation, seed=seed)
    recipe = crc.Recipe(method, radius=0.5, gamma=0.01, epochs=6, batch_size=64, attack_steps=3)
    crc.train(model, crc.load("digits").train, recipe)
    return model


def cases(seed: int):
    """Every model of the campaign with inputs for it."""
    generator = torch.Generator().manual_seed(seed)
    activations = sorted(crc.ACTIVATIONS)
    dtypes = (torch.float32, torch.float64)
    for shape, activation, scale, dtype in itertools.product(SHAPES, activations, SCALES, dtypes):
        model = random_model(shape, activation, scale, dtype, seed)
        x = torch.randn(60, shape[0], generator=generator, dtype=dtype)
        yield f"random {len(shape) - 1} layers", model, x
    digits = crc.load("digits").test.x
    for layers, activation in itertools.product((2, 3, 4), ("softplus", "sigmoid", "tanh")):
        for method in ("standard", "crt"):
            yield (
                f"{method} {layers} layers",
                trained_model(layers, activation, method, seed),
                digits,
            )


def challenge(model, x, restarts: int, seed: int) -> dict[str, float]:
    """Certify inputs against each class by itself and attack every one of the certificates."""
    network = read_network(model)
    flat = x.flatten(1).double()
    y = network.logits(flat).argmax(1)
    certificate = crc.certify(model, x, y)
    attacked = crc.attack(model, x, y, restarts=restarts, seed=seed)
    closer = boundary_points(network, flat, y, certificate.target,
                             certificate.nearest.nan_to_num())  # fmt: skip
    distance = torch.minimum(
        attacked.distance, (closer - flat).norm(dim=1).nan_to_num(nan=torch.inf)
    )
    inside = [attacked.point, closer, certificate.nearest]
    violations = sum(int(broken(network, flat, y, certificate.radius, p).sum()) for p in inside)
    found = distance.isfinite() & (distance > 0)
    return {
        "certificates": len(x) * (network.classes - 1),
        "violations": violations,
        "radius": certificate.radius[found].sum().item(),
        "distance": distance[found].sum().item(),
    }


def broken(network, x, y, radius, point) -> torch.Tensor:
    """Whether a point inside the certified ball is proved to be classified differently."""
    prover, inside = Prover.of(network), (point - x).norm(dim=1) < radius * (1 - 1e-12)
    wrong = torch.zeros_like(inside)
    for target in range(network.classes):
        targets = torch.full_like(y, target)
        pairs = Pairs(x, y, targets, torch.zeros_like(radius))
        wrong |= (targets != y) & prover.is_adversarial(pairs, point.nan_to_num())
    return inside & wrong & (radius > 0)


def main() -> int:
    """Run the campaign and print a table; the status is 1 where a certificate was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--certificates", type=int, default=100_000, help="at least so many")
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are fastest on one core
    totals: dict[str, dict[str, float]] = {}
    started, seed, done = time.time(), options.seed, 0
    with tqdm(total=options.certificates, unit="certificate") as bar:
        while done < options.certificates:
            for name, model, x in cases(seed):
                figures = challenge(model, x, options.restarts, seed)
                row = totals.setdefault(name, dict.fromkeys(figures, 0.0))
                for key, value in figures.items():
                    row[key] += value
                done += figures["certificates"]
                bar.update(figures["certificates"])
            seed += 1
    print(f"{'networks':20} {'certificates':>13} {'violations':>11} {'certified/attack':>17}")
    for name, row in totals.items():
        ratio = row["radius"] / max(row["distance"], 1e-300)
        print(f"{name:20} {row['certificates']:13.0f} {row['violations']:11.0f} {ratio:17.3f}")
    violations = int(sum(row["violations"] for row in totals.values()))
    print(f"{done} certificates, {violations} violations, {time.time() - started:.0f} s")
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
