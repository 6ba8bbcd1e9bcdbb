"""Certified first, then attacked: ``python benchmarks/attacked.py NETWORK --dataset mnist``.

Every test image that a certificate holds for is attacked in the certified ball, by this package
and by two attacks of adv-lib (``pip install adv-lib``; it is kept up, and its attacks are the
references of their papers): Auto-PGD for a ball of given radius, with restarts (Croce & Hein 2020),
and DDN, which looks for the nearest adversary (Rony et al. 2019). One adversary found would refute
the certificates. The images that none holds for are attacked as well: an attack that breaks none of
them would prove nothing by failing.
"""

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import crcbook as crc
from crcbook.certificate import verify_by_kind
from crcbook.checkpoints import write_json
from crcbook.datasets import Split
from crcbook.experiments import environment
from crcbook.networks import Network, read_network

STEPS, RESTARTS, TOGETHER = 100, 3, 500
BOX = (0.0, 1.0)


class Zoomed(nn.Module):
    """A model of images in [0, 1], as one of the cube [-r, 1 + r] shrunk to [0, 1].

    adv-lib keeps its points in [0, 1]: in the shrunk cube that stops nothing in a ball of radius r.
    """

    def __init__(self, model: nn.Module, radius: float) -> None:
        """Wrap a model."""
        super().__init__()
        self.model, self.radius = model, radius

    def forward(self, u: Tensor) -> Tensor:
        """The logits at ``(batch, *input_shape)`` points of the shrunk cube."""
        return self.model(u * (1 + 2 * self.radius) - self.radius)

    def shrink(self, x: Tensor) -> Tensor:
        """Where points are in the shrunk cube."""
        return (x + self.radius) / (1 + 2 * self.radius)


def attacks(model: nn.Module, items: Split, radius: float, box: bool) -> dict[str, Tensor]:
    """Attack items in their balls.

    Args:
        model: the classifier, of images in [0, 1].
        items: the images and their labels.
        radius: of the balls.
        box: whether the points must stay in [0, 1].

    Returns:
        For each attack ``(items,)`` bool: whether its point lies in the ball, and in the box, and
        has another class, all judged in float64.
    """
    from adv_lib.attacks import apgd, ddn

    margin = 0.0 if box else radius
    zoomed = Zoomed(model, margin)
    x, y, scale = zoomed.shrink(items.x), items.y, 1 + 2 * margin
    options = {"eps": radius / scale, "norm": 2, "n_iter": STEPS, "n_restarts": RESTARTS}
    own = crc.attack(
        model, items.x, y, radius, BOX if box else None, steps=STEPS, restarts=RESTARTS
    )
    found = {
        "crcbook": own.point.reshape(items.x.shape),
        "Auto-PGD, logits' ratio": scale * apgd(zoomed, x, y, **options) - margin,
        "Auto-PGD, cross-entropy": scale * apgd(zoomed, x, y, **options, loss_function="ce")
        - margin,
        "DDN": scale * ddn(zoomed, x, y, steps=STEPS, levels=None) - margin,
    }
    network = read_network(model)
    return {name: broken(network, items, point, radius, box) for name, point in found.items()}


@torch.no_grad()
def broken(network: Network, items: Split, point: Tensor, radius: float, box: bool) -> Tensor:
    """Which points are adversaries in the balls: a little too far, they are moved inside first."""
    x, point = items.x.double(), point.double()
    if box:
        point = point.clamp(*BOX)
    away = (point - x).flatten(1)
    distance = away.norm(dim=1)
    near = distance <= radius * (1 + 1e-4)
    away = away * (radius * (1 - 1e-9) / distance).clamp(max=1)[:, None]
    logits = network.logits(x.flatten(1) + away)
    return near & (logits.argmax(1) != items.y)


def count(model: nn.Module, items: Split, radius: float) -> dict[str, dict]:
    """Certify items, then attack them.

    Args:
        model: the classifier, of images in [0, 1].
        items: the images and their labels.
        radius: of the balls.

    Returns:
        For each kind of certificate, how many items it holds for and how many of those each attack
        broke; and the same of the correctly classified ones that no certificate holds for.
    """
    kinds = verify_by_kind(model, items.x, items.y, radius, BOX)
    with torch.no_grad():
        correct = model(items.x).argmax(1) == items.y
    rows = {
        "certified, global": (kinds["global"], False),
        "certified, local": (kinds["local"] & ~kinds["global"], False),
        "certified in the box": (kinds["local in box"], True),
        "not certified": (correct & ~kinds["local"], False),
        "not certified in the box": (correct & ~kinds["local in box"], True),
    }
    return {name: _count(model, items, radius, *row) for name, row in rows.items()}


def _count(model: nn.Module, items: Split, radius: float, chosen: Tensor, box: bool) -> dict:
    place = chosen.nonzero().squeeze(1)
    sums: dict[str, int] = {}
    together = torch.zeros(0, dtype=torch.bool)
    for part in place.split(TOGETHER) if len(place) else ():
        found = attacks(model, Split(items.x[part], items.y[part]), radius, box)
        for name, rows in found.items():
            sums[name] = sums.get(name, 0) + int(rows.sum())
        together = torch.cat([together, torch.stack(list(found.values())).any(0)])
    return {"images": len(place), "broken": {**sums, "by any of them": int(together.sum())}}


def main() -> int:
    """Print the counts, and write them where that is asked for; 1 where a certificate is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", type=Path, help="a .safetensors file")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--radius", type=float, default=1.58)
    parser.add_argument("--limit", type=int, help="the first images only")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    options = parser.parse_args()
    try:
        import adv_lib  # noqa: F401
    except ImportError:
        print("attacked.py needs one more package: pip install adv-lib", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    model, items = crc.load_model(options.network), crc.load(options.dataset).test
    started = time.time()
    rows = count(model, items.take(slice(0, options.limit)), options.radius)
    for name, row in rows.items():
        print(f"{name:26} {row['images']:6} images, broken: {row['broken']}")
    if options.json:
        facts = {
            "network": options.network.stem,
            "dataset": options.dataset,
            "radius": options.radius,
            "steps": STEPS,
            "restarts": RESTARTS,
            "seed": 0,
            "adv-lib": version("adv-lib"),
            "seconds": round(time.time() - started),
        }
        words = f"{options.network} --dataset {options.dataset} --radius {options.radius:g}"
        words += f" --limit {options.limit}" if options.limit else ""
        words += f" --json {options.json}"
        command = {"command": f"python benchmarks/attacked.py {words}"}
        write_json(
            options.json, facts | {"rows": rows, "environment": environment("cpu")} | command
        )
    refuted = any(
        row["broken"]["by any of them"] for name, row in rows.items() if name.startswith("cert")
    )
    return int(refuted)


if __name__ == "__main__":
    sys.exit(main())
