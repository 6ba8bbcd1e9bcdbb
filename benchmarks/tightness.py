"""How close certificates come to the truth: ``make tightness RUNS="runs/a runs/b"``.

For each MNIST run: clean accuracy, and over the correctly classified of the first test images the
mean certified radius (local curvature) against the mean distance of the best
attack found; 1 is exact. Beside it our curvature bound against the published deep one (Singla &
Feizi 2020, Theorem 4), the median over all pairs of classes; for two layers both are exact.
"""

import argparse
import sys
from pathlib import Path

import torch

import crcbook as crc
from crcbook.networks import Network, read_network


def published_bound(network: Network, label, target) -> torch.Tensor:
    """The published bound of the Hessian's norm of ``z_label - z_target``."""
    layers = network.layers
    slope, bend = layers[0].activation.max_slope, layers[0].activation.max_bend
    norms = [torch.linalg.matrix_norm(layer.weight, 2) for layer in layers[:-1]]
    outer = network.margin_weights(label, target).abs()
    reach = norms[0] * slope ** len(norms[1:])
    for norm in norms[1:]:
        reach = reach * norm
    total = torch.zeros(len(label), dtype=torch.float64)
    for place in range(len(layers) - 2, -1, -1):
        total = total + bend * reach**2 * outer.amax(1)
        if place:
            outer = slope * (outer @ layers[place].weight.abs())
            reach = reach / (slope * norms[place])
    return total


def main() -> int:
    """Print a row a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of MNIST runs, or models")
    parser.add_argument("--limit", type=int, default=1000, help="images")
    options = parser.parse_args()
    test = crc.load("mnist").test
    part = test.take(slice(0, options.limit))
    label, target = (1 - torch.eye(10)).nonzero().T
    print(f"{'run':28}{'layers':>7}{'clean %':>9}{'certified':>11}{'attack':>9}{'ratio':>8}"
          f"{'curvature / published':>23}")  # fmt: skip
    for run in options.runs:
        model = crc.load_model(run)
        network = read_network(model)
        clean = (network.logits(test.x.flatten(1).double()).argmax(1) == test.y).double().mean()
        certificate = crc.certify(
            model, part.x, part.y, curvature="local", method="dual", progress=True
        )
        attacked = crc.attack(model, part.x, part.y, restarts=2, progress=True)
        distance = torch.minimum(attacked.distance, certificate.distance)
        right = (distance > 0) & distance.isfinite()
        radius, distance = certificate.radius[right].mean(), distance[right].mean()
        ours = -crc.curvature_bounds(model, label, target)[0]
        curvature = (ours / published_bound(network, label, target)).median()
        name = run.name.removesuffix(".safetensors")
        print(f"{name:28}{len(network.layers):7}{100 * clean:9.2f}{radius:11.3f}"
              f"{distance:9.3f}{radius / distance:8.3f}{curvature:23.3f}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
