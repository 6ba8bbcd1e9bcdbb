"""How close certificates come to the truth: ``make tightness RUNS="runs/a runs/b"``.

For each MNIST run: clean accuracy, and over the correctly classified of the first test images the
mean certified radius (local curvature) against the mean distance of the best
attack found; 1 is exact. Beside it the mean radius of Entesari, Sharifi & Fazlyab (2024): the
closed form at the input, with the curvature composed layer by layer; and our curvature bound
against the published deep one (Singla & Feizi 2020, Theorem 4) and against the composed one,
medians over all pairs of classes; for two layers ours and the published one are exact.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import crcbook as crc
from crcbook.networks import Network, read_network
from crcbook.proof.quadratic import Parabola


def published_bound(network: Network, label: Tensor, target: Tensor) -> Tensor:
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


def composed_bound(network: Network, label: Tensor, target: Tensor) -> Tensor:
    r"""The curvature of ``z_label - z_target``, composed layer by layer (Entesari et al. 2024).

    The Jacobian of a layer :math:`h(x) = \sigma(Wx + b)` has a Lipschitz constant of at most
    :math:`J = \max|\sigma''| \cdot \|\mathrm{diag}(\|w_i\|) W\|`. With L for the layer's own
    Lipschitz constant and m for that of all before it, :math:`k \leftarrow J m^2 + L k`. They bound
    m by LipLT (Fazlyab et al. 2023).
    """
    curvature, prefixes = torch.zeros((), dtype=torch.float64), [torch.ones(())]
    for place, layer in enumerate(network.layers[:-1]):
        weight, row = layer.weight, layer.activation
        bent = torch.linalg.matrix_norm(weight.norm(dim=1, keepdim=True) * weight, 2)
        steep = row.max_slope * torch.linalg.matrix_norm(weight, 2)
        curvature = row.max_bend * bent * prefixes[-1] ** 2 + steep * curvature
        prefixes.append(row.max_slope * _lip_lt(network, place, prefixes))
    return curvature * network.margin_weights(label, target).norm(dim=1)


def _lip_lt(network: Network, place: int, prefixes: list[Tensor]) -> Tensor:
    """The Lipschitz constant of a layer's preactivations, given those of the activations before."""
    product = network.layers[place].weight
    total, share = torch.zeros((), dtype=torch.float64), 1.0
    for before in range(place - 1, -1, -1):
        row = network.layers[before].activation
        low, high = row.slope_range
        # Slopes are their centre and what is left of it: the rest ends at the layer before.
        preactivations = prefixes[before + 1] / row.max_slope
        norm = torch.linalg.matrix_norm(product, 2)
        total = total + share * (high - low) / 2 * norm * preactivations
        share = share * (high + low) / 2
        product = product @ network.layers[before].weight
    return total + share * torch.linalg.matrix_norm(product, 2)


def composed_radius(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """The closed form at the inputs with the composed curvature, against all classes.

    Args:
        network: the float64 network.
        x: ``(batch, n)`` float64 inputs.
        y: ``(batch,)`` labels.

    Returns:
        ``(batch,)`` radii, 0 where misclassified; margins and k have their roundings.
    """
    found = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for other in range(1, network.classes):
        target = (y + other) % network.classes
        margin, gradient = network.margin_and_gradient(x, y, target)
        k, slope = composed_bound(network, y, target), gradient.norm(dim=1)
        found = found.fmin(Parabola(margin, slope, k).radius())
    return found


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
          f"{'composed':>10}{'curvature / published':>23}{'/ composed':>12}")  # fmt: skip
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
        bounds = published_bound(network, label, target), composed_bound(network, label, target)
        published, composed = ((ours / bound).median() for bound in bounds)
        theirs = composed_radius(network, part.x.flatten(1).double(), part.y)[right].mean()
        name = run.name.removesuffix(".safetensors")
        print(f"{name:28}{len(network.layers):7}{100 * clean:9.2f}{radius:11.3f}"
              f"{distance:9.3f}{radius / distance:8.3f}{theirs:10.3f}"
              f"{published:23.3f}{composed:12.3f}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
