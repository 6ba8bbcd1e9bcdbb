"""How tight a convolutional network's default is: ``python benchmarks/convolutional.py``.

A network with two convolutions and softplus is trained on attacked MNIST images, with a penalty on
its weights of several strengths, none at first. Each is then certified as anyone's network is, by
:func:`crcbook.certify` as it stands, on the first test images that it classifies correctly, and
attacked. What the penalty costs in clean accuracy stands beside what it brings.

With the spectral norms :math:`s_1, s_2` of the kernels, read as matrices with a row a filter, and
the largest weight w of the last layer, the penalty is :math:`s_1^2 s_2 w (1 + s_2)`: what the bends
of the two hidden layers are multiplied by on their way to a logit.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import crcbook as crc
from crcbook.checkpoints import write_json
from crcbook.datasets import Split
from crcbook.experiments import environment

RECORD = Path(__file__).parents[1] / "book" / "results" / "benchmarks" / "convolutional.json"
STRENGTHS, SEEDS = (0.0, 0.01, 0.03, 0.1), (0, 1)
RADIUS, STEPS, BATCH, RATE = 1.0, 2, 128, 5e-3  # of the attacks in the training; items; peak rate


def network() -> nn.Sequential:
    """Two convolutions and a linear layer, for 28 x 28 pixels."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 16, 4, stride=4), nn.Softplus(),
        nn.Conv2d(16, 32, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


def attacked(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Points of l2 balls, after a few steps along the gradient of the cross-entropy."""
    delta = torch.zeros_like(x)
    for _ in range(STEPS):
        delta.requires_grad_(True)
        loss = nn.functional.cross_entropy(model(x + delta), y)
        (gradient,) = torch.autograd.grad(loss, delta)
        way = nn.functional.normalize(gradient.flatten(1), dim=1).view_as(x)
        delta = (delta.detach() + 0.8 * radius * way).flatten(1)
        delta = delta * (radius / (delta.norm(dim=1, keepdim=True) + 1e-12)).clamp(max=1)
        delta = delta.view_as(x)
    return x + delta


def penalty(model: nn.Sequential) -> Tensor:
    """What the bends of the hidden layers are multiplied by."""
    first, second, last = (module.weight for module in model if hasattr(module, "weight"))
    one, two = (torch.linalg.matrix_norm(kernel.flatten(1), 2) for kernel in (first, second))
    return one**2 * two * last.abs().amax() * (1 + two)


def train(data: Split, strength: float, epochs: int, seed: int) -> nn.Sequential:
    """Train a network on points of balls that grow for the first 40 % of the steps.

    Args:
        data: images, ``(items, 28, 28)``.
        strength: of the penalty.
        epochs: passes over the data.
        seed: of the initialisation and the order.

    Returns:
        The network.
    """
    torch.manual_seed(seed)
    model, count = network(), len(data) // BATCH
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=count * epochs)
    for step in range(count * epochs):
        if step % count == 0:
            order = torch.randperm(len(data)).split(BATCH)
        x, y = data.x[order[step % count]], data.y[order[step % count]]
        points = attacked(model, x, y, RADIUS * min(1.0, step / (0.4 * count * epochs)))
        loss = nn.functional.cross_entropy(model(points), y)
        loss = loss + strength * penalty(model) if strength else loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def compare(model: nn.Module, test: Split, images: int) -> dict:
    """The default's mean radius beside an attack's mean distance.

    Args:
        model: the network.
        test: its test items.
        images: of these, the first ones that it classifies correctly.

    Returns:
        The row of the record.
    """
    with torch.inference_mode():
        correct = model(test.x.float()).argmax(1) == test.y
    rows = correct.nonzero().squeeze(1)[:images]
    x, y, model = test.x[rows].double(), test.y[rows], model.double()
    found = crc.certify(model, x, y)
    distance = crc.attack(model, x, y, restarts=3).distance
    distance = distance.minimum(found.distance.nan_to_num(nan=torch.inf)).mean().item()
    radius = found.radius.mean().item()
    return {
        "clean accuracy": correct.double().mean().item(),
        "images": len(rows),
        "default": radius,
        "attack": distance,
        "default over attack": radius / distance,
        "methods": {name: found.method.count(name) for name in sorted(set(found.method))},
    }


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, print a row a network and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", help="of 28 x 28 pixels")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--json", type=Path, default=RECORD, help="file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data, rows = crc.load(options.dataset), []
    train_items = Split(data.train.x.float(), data.train.y)
    for strength in options.strengths:
        for seed in options.seeds:
            started = time.process_time()
            model = train(train_items, strength, options.epochs, seed)
            row = {"strength": strength, "seed": seed, "epochs": options.epochs}
            row |= compare(model, data.test, options.images)
            rows.append(row | {"CPU seconds": time.process_time() - started})
            print(
                f"strength {strength:<5g} seed {seed}  clean {row['clean accuracy']:.2%}  default "
                f"{row['default']:.3f}  attack {row['attack']:.3f}  "
                f"{row['default over attack']:.2f} of it",
                flush=True,
            )
    command = ["python benchmarks/convolutional.py", *map(str, arguments or sys.argv[1:])]
    record = {
        "dataset": options.dataset,
        "radius of the attacks in training": RADIUS,
        "rows": [
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        ],
        "environment": environment("cpu"),
        "command": " ".join(command),
    }
    write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
