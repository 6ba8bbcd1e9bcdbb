"""Try to break certificates: ``make soundness``.

Random and trained networks of 2 to 5 layers, every activation, weights of many scales, in float32
and float64, with and without a box, with global and local curvature, by every method: each
certified radius is attacked from the input, from random points and from the certificate's nearest
point, and along every class's gradient. Now and then comes a network of the size of MNIST's, as it
is or deepened. A violation is a point inside a certified ball whose margin, the rounding error of
its float64 evaluation added, is not positive.

Verdicts are asked for balls that just hold an adversary, and every one of them that calls the
network robust is a violation: of ``verify`` by every method, and of what it would prove without
looking for an adversary first. How many balls of nine tenths of that radius it proves
stands beside.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

import crcbook as crc
from crcbook.attacks import Aim, boundary_points
from crcbook.certificate.question import Margin
from crcbook.checks import as_box
from crcbook.networks import deepen, read_network
from crcbook.proof.box import Box, clip
from crcbook.proof.prover import Entries, Prover
from crcbook.stages.local import Local

SHAPES = ([2, 16, 3], [12, 40, 10], [6, 20, 12, 4], [8, 16, 16, 16, 5], [5, 10, 10, 10, 10, 3],
          [150, 20, 5], [150, 16, 12, 4])  # fmt: skip
THIN = ([24, 40, 8], [24, 24, 12, 8])
SCALES = (0.1, 1.0, 3.0, 20.0)
SETTINGS = {
    "best": {},
    "box": {"box": (0.0, 1.0)},
    "local": {"curvature": "local"},
    "box, local": {"box": (0.0, 1.0), "curvature": "local"},
    "dual": {"method": "dual"},
    "closed-form": {"method": "closed-form"},
    "lipschitz": {"method": "lipschitz"},
    "crown": {"method": "crown"},
}
VERDICTS = {"verdicts": None, "verdicts, box": (0.0, 1.0)}
BEYOND, WITHIN = 1 + 1e-6, 0.9  # of the distance of an adversary
COSTLY = 12  # items for the settings that take an eigenvalue problem or a search for each
JUDGED = 4  # items for verdicts, each of which takes several of these
OTHER_BOUNDS = ("lipschitz", "crown")  # that verdicts can rest on
WIDE, WIDE_ITEMS, WIDE_EVERY = [784, 1024, 10], 2, 40  # one such network after so many others


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


def trained_cases(seed: int):
    """Networks trained on the digits, with images for each."""
    generator = torch.Generator().manual_seed(seed)
    digits = crc.load("digits").test.x
    for layers, activation in itertools.product((2, 3, 4, 5), ("softplus", "sigmoid", "tanh")):
        for method in ("standard", "crt"):
            model = trained_model(layers, activation, method, seed)
            images = digits[torch.randperm(len(digits), generator=generator)[:40]]
            yield f"{method} {layers}", model, images


def random_cases(seed: int):
    """Random networks, with inputs in [0, 1] for each."""
    generator = torch.Generator().manual_seed(seed)
    activations = sorted(crc.ACTIVATIONS)
    dtypes = (torch.float32, torch.float64)
    for shape, activation, scale, dtype in itertools.product(SHAPES, activations, SCALES, dtypes):
        model = random_model(shape, activation, scale, dtype, seed)
        yield f"random {len(shape) - 1}", model, torch.rand(24, shape[0], generator=generator)


def thin_cases(seed: int):
    """Networks whose first layer has few directions that count: some proofs are in float32."""
    generator = torch.Generator().manual_seed(seed)
    for shape, activation, scale in itertools.product(THIN, sorted(crc.ACTIVATIONS), SCALES):
        model = random_model(shape, activation, 1.0, torch.float32, seed)
        tall, wide = (torch.randn(*size, generator=generator) for size in ((shape[1], 3), (3, 24)))
        with torch.no_grad():
            model[1].weight.mul_(0.05).add_(tall @ wide / 8).mul_(scale)
            model[-1].weight.mul_(scale)
        yield f"thin {len(shape) - 1}", model, torch.rand(24, 24, generator=generator)


def wide_cases(seed: int):
    """Networks of 784 inputs and 1024 units, of 2 layers or deepened, without an end."""
    generator = torch.Generator().manual_seed(seed)
    kinds = list(itertools.product((2, 3, 4), sorted(crc.ACTIVATIONS), SCALES))
    for place in itertools.count():
        if place % len(kinds) == 0:
            order = torch.randperm(len(kinds), generator=generator).tolist()
        layers, activation, scale = kinds[order[place % len(kinds)]]
        model = random_model(WIDE, activation, 1.0, torch.float32, seed + place)
        tall, wide = (torch.randn(*size, generator=generator) for size in ((1024, 5), (5, 784)))
        with torch.no_grad():
            model[1].weight.mul_(0.05).add_(tall @ wide / 784**0.5).mul_(scale)
        if layers > 2:
            model = deepen(model, layers)
            with torch.no_grad():  # so that the new layers are not copies alone
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(1e-3 * parameter.abs().amax() * noise)
        yield f"wide {layers}", model, torch.rand(WIDE_ITEMS, 784, generator=generator)


def all_cases(seed: int) -> Iterator:
    """A pass: every kind of network, and now and then a wide one."""
    wide = wide_cases(seed)
    rest = itertools.chain(trained_cases(seed), thin_cases(seed), random_cases(seed))
    for place, case in enumerate(rest, start=1):
        yield case
        if place % WIDE_EVERY == 0:
            yield next(wide)


def challenge(model, x, options: dict, restarts: int, seed: int) -> dict[str, float]:
    """Certify inputs against every class, and attack every one of the certificates."""
    network = read_network(model)
    flat = x.flatten(1).double()
    y = network.logits(flat).argmax(1)
    certificate = crc.certify(model, x, y, **options)
    bounds = options.get("box")
    attacked = crc.attack(model, x, y, box=bounds, restarts=restarts, seed=seed)
    box = as_box(bounds, flat)
    nearest, reached = (p.flatten(1).double() for p in (certificate.nearest, attacked.point))
    start = torch.where(nearest.isnan(), reached, nearest).nan_to_num()
    closer = boundary_points(Aim(network, flat, y, certificate.target, box), start)
    distance = torch.minimum(
        attacked.distance, (closer - flat).norm(dim=1).nan_to_num(nan=torch.inf)
    )
    points = [reached, closer, nearest, *inside(network, flat, y, certificate)]
    points = [clip(box, point) for point in points]
    violations = sum(int(broken(network, flat, y, certificate.radius, p).sum()) for p in points)
    found = distance.isfinite() & (distance > 0)
    return {
        "certificates": len(x) * (network.classes - 1),
        "violations": violations,
        "radius": certificate.radius[found].sum().item(),
        "distance": distance[found].sum().item(),
    }


def judge(model, x, bounds: tuple | None, restarts: int, seed: int) -> dict[str, float]:
    """Ask for verdicts on balls that hold an adversary, and on smaller ones."""
    network = read_network(model)
    flat = x.flatten(1).double()
    logits = network.logits(flat)
    y, second = logits.topk(2).indices.T
    box = as_box(bounds, flat)
    attacked = crc.attack(model, x, y, box=bounds, restarts=restarts, seed=seed)
    # Well across the boundary.
    point = clip(box, flat + (1 + BEYOND) / 2 * (attacked.point.flatten(1).double() - flat))
    held = broken(network, flat, y, BEYOND * attacked.distance, point).nonzero()
    figures = {"certificates": len(held) * (network.classes - 1), "violations": 0}
    figures |= {"radius": 0.0, "distance": attacked.distance[held].sum().item()}
    options = {"box": bounds, "curvature": "local"}
    for item in held.squeeze(1).tolist():
        one, distance = (flat[item : item + 1], y[item : item + 1]), attacked.distance[item].item()
        verdict, radius = partial(crc.verify, model, *one, **options), BEYOND * distance
        claims = [verdict(radius).robust, unlooked(network, *one, radius, box)]
        if network.logits(point[item : item + 1]).argmax() == second[item]:
            claims.append(verdict(radius, targets="runner-up").robust)
        for method in OTHER_BOUNDS if box is None else ():
            claims.append(crc.verify(model, *one, radius, method=method).robust)
        figures["violations"] += int(torch.cat(claims).sum())
        figures["radius"] += WITHIN * distance * verdict(WITHIN * distance).robust.item()
    return figures


def unlooked(network, x, y, radius: float, box: Box | None) -> torch.Tensor:
    """The verdict on a ball by local curvature alone, whatever an attack would find in it."""
    prover, targets = Prover.of(network), torch.arange(network.classes)
    targets = targets[targets != y]
    many = x.expand(len(targets), -1)
    allowed = None if box is None else box.around(many)
    entries = Entries.of(prover, many, y.expand(len(targets)), targets, allowed)
    # All of one image, and each a hair short of being proved.
    nothing, image = torch.full_like(entries.bound, -1e-300), torch.zeros_like(entries.image)
    entries = replace(entries, bound=nothing, image=image)
    question, radii = Margin(many.new_full((1,), radius)), torch.full_like(nothing, radius)
    return (Local(prover, box is not None).raise_bounds(question, entries, radii) > 0).all()[None]


def inside(network, x, y, certificate):
    """Points just inside the certified balls, where each class's margin falls fastest."""
    radius = certificate.radius.nan_to_num(posinf=1e6) * (1 - 1e-9)
    for shift in range(1, network.classes):
        target = (y + shift) % network.classes
        _, gradient = network.margin_and_gradient(x, y, target)
        yield x - radius[:, None] * torch.nn.functional.normalize(gradient, dim=1)


def broken(network, x, y, radius, point) -> torch.Tensor:
    """Whether a point inside the certified ball is proved to be classified differently."""
    prover, inside = Prover.of(network), (point - x).norm(dim=1) < radius * (1 - 1e-12)
    wrong = torch.zeros_like(inside)
    for target in range(network.classes):
        pair, at = (y, torch.full_like(y, target)), point.nan_to_num()
        margin, _ = network.margin_and_units(at, *pair)
        error = prover.margin_error(*pair, at)
        wrong |= (pair[1] != y) & (margin + error <= 0)
    return inside & wrong & (radius > 0)


def campaign(certificates: int, restarts: int = 4, seed: int = 0) -> dict[str, dict[str, float]]:
    """Challenge at least so many certificates; the totals by kind of network and setting.

    Ctrl-C ends it early, with the totals so far.
    """
    totals: dict[str, dict[str, float]] = {}
    with tqdm(total=certificates, unit="certificate") as bar, suppress(KeyboardInterrupt):

        def add(name: str, figures: dict[str, float]) -> None:
            row = totals.setdefault(name, dict.fromkeys(figures, 0.0))
            for key, value in figures.items():
                row[key] += value
            bar.update(figures["certificates"])

        while sum(row["certificates"] for row in totals.values()) < certificates:
            for name, model, x in all_cases(seed):
                for setting, options in SETTINGS.items():
                    costly = "local" in setting or setting == "crown"
                    part = x[:COSTLY] if costly else x
                    add(f"{name}, {setting}", challenge(model, part, options, restarts, seed))
                for setting, bounds in VERDICTS.items():
                    add(f"{name}, {setting}", judge(model, x[:JUDGED], bounds, restarts, seed))
            seed += 1
    return totals


def main() -> int:
    """Run the campaign and print a table; the status is 1 where a certificate was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--certificates", type=int, default=100_000, help="at least so many")
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are fastest on one core
    started = time.time()
    totals = campaign(options.certificates, options.restarts, options.seed)
    print(f"{'networks, layers, setting':28} {'certificates':>13} {'violations':>11} "
          f"{'certified/attack':>17}")  # fmt: skip
    for name, row in totals.items():
        ratio = row["radius"] / max(row["distance"], 1e-300)
        print(f"{name:28} {row['certificates']:13.0f} {row['violations']:11.0f} {ratio:17.3f}")
    done, violations = (
        int(sum(row[key] for row in totals.values())) for key in ("certificates", "violations")
    )
    print(f"{done} certificates, {violations} violations, {time.time() - started:.0f} s")
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
