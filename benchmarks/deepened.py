"""Is an inserted layer depth? ``python benchmarks/deepened.py SHALLOW [DEEP ...]``.

The deep rows of the tables start as a network with one hidden layer and inserted copies of its
units. Three controls say what the copies do. *Untrained*: the shallow network deepened and left
alone. *Linearised*: the inserted layers of a trained one replaced by their tangents and folded
away, which leaves a network with one hidden layer. And *bends*: how far the slope of an inserted
unit varies in the ball of an image, by proved intervals. If an untrained copy certifies what the
shallow network does, a deep row that does no better has shown nothing about depth.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import crcbook as crc
from crcbook.certificate import verify_by_kind
from crcbook.checkpoints import write_json
from crcbook.datasets import Split
from crcbook.experiments import environment, paired
from crcbook.networks import deepen, mlp_of, read_network
from crcbook.proof.intervals import activation_ranges, preactivation_intervals
from crcbook.proof.rounding import RoundingModel

BENDS = 0.01  # of the largest slope: a unit whose slope varies by more counts as bending


def linearised(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """A network whose hidden layers above the first are folded into one affine map.

    Args:
        model: an ``mlp``.
        x: inputs; an activation becomes its tangent at the mean of its preactivations there.

    Returns:
        An ``mlp`` with one hidden layer.
    """
    network = read_network(model)
    values = network.preactivations(x.flatten(1).double())
    first, *inner, last = network.layers
    weight, bias = last.weight, last.bias
    for layer, z in reversed(list(zip(inner, values[1:], strict=True))):
        at = z.mean(0)
        value, slope = layer.activation.value(at), layer.activation.slope(at)
        bias = bias + weight @ (value + slope * (layer.bias - at))
        weight = weight @ (slope[:, None] * layer.weight)
    weights = [(first.weight, first.bias), (weight, bias)]
    return mlp_of(weights, first.activation.name, next(model.parameters()))


def bends(model: nn.Module, x: Tensor, radius: float) -> dict[str, float]:
    """How far the slopes of the units above the first hidden layer vary in balls.

    Args:
        model: the network.
        x: the balls' centres.
        radius: of the balls.

    Returns:
        The share of pairs of a unit and an image whose slope varies by more than ``BENDS`` of the
        largest slope, and the mean variation, of the largest slope; empty for one hidden layer.
    """
    network = read_network(model)
    inputs, inner = x.flatten(1).double(), network.layers[1:-1]
    if not inner:
        return {}
    reach = torch.full((len(inputs),), radius, dtype=torch.float64)
    intervals = preactivation_intervals(RoundingModel.of(network), inputs, reach)
    ranges = activation_ranges(network, intervals)[1:]
    varied = torch.stack([
        (high - low) / layer.activation.max_slope
        for layer, (low, high, _, _) in zip(inner, ranges, strict=True)
    ])  # fmt: skip
    return {"bends": float((varied > BENDS).double().mean()), "varies": float(varied.mean())}


def measured(model: nn.Module, test: Split, radius: float, answers: Tensor) -> dict:
    """What a network certifies, how often it answers as another one does, and how it bends."""
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in test.x.split(1000)])
    kinds = verify_by_kind(model, test.x, test.y, radius)
    return {
        "layers": len(read_network(model).layers),
        "clean": float((found == test.y).double().mean()),
        **{f"certified, {name}": float(kinds[name].double().mean()) for name in kinds},
        "answers as the shallow one": float((found == answers).double().mean()),
        **bends(model, test.x[:100], radius),
        "bits": kinds["local"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Print and record a row a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shallow", type=Path, help="a network with one hidden layer")
    parser.add_argument("deep", type=Path, nargs="*", help="trained ones that started as copies")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--radius", type=float, default=1.58)
    parser.add_argument("--images", type=int, default=1000, help="test images, from the first")
    parser.add_argument("--json", type=Path, help="write a record here")
    options = parser.parse_args(arguments)
    data = crc.load(options.dataset)
    test = data.test.take(slice(0, options.images))
    shallow = crc.load_model(options.shallow)
    networks = {"shallow": shallow}
    networks |= {f"untrained, {layers} layers": deepen(shallow, layers) for layers in (3, 4)}
    for path in options.deep:
        model = crc.load_model(path)
        name = path.parent.name if path.stem == "model" else path.stem
        networks |= {name: model, f"{name}, linearised": linearised(model, data.train.x[:1000])}
    with torch.no_grad():
        answers = shallow(test.x).argmax(1)
    rows, bits = {}, {}
    for name, model in networks.items():
        row = measured(model, test, options.radius, answers)
        bits[name] = row.pop("bits")
        against = paired(bits[name], bits["shallow"])
        rows[name] = row | {"certified alone": against.first, "shallow alone": against.second}
        print(name, rows[name], flush=True)
    record = {
        "dataset": options.dataset,
        "radius": options.radius,
        "images": len(test),
        "networks": rows,
        "environment": environment("cpu"),
        "command": " ".join(
            ["python benchmarks/deepened.py", *map(str, arguments or sys.argv[1:])]
        ),
    }
    if options.json:
        write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
