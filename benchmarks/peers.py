"""Certified radii beside those of auto_LiRPA, on networks in files, in one run.

    python benchmarks/peers.py NETWORK.onnx MODEL.safetensors ...

The peer (Xu et al. 2020) bounds margins by the linear relaxations of CROWN, and a bisection finds
the largest radius at which all of them are positive: twelve halvings of [0, 2], all images in one
batch, in float32 and without rounding; and again with slopes optimised by twenty gradient steps at
each radius (alpha-CROWN, Xu et al. 2021). Both see the same first test images that a network
classifies correctly, and the layers that crcbook reads from the file, on one thread and in turns.
Seconds are of the processor, the fewest of two turns, of five where a turn is quick: what else the
machine does meets both alike.

Nothing is installed here. The peer is found where Python finds it:

    git clone https://github.com/Verified-Intelligence/auto_LiRPA
    PYTHONPATH=auto_LiRPA python benchmarks/peers.py ...

It imports a few packages of its own, which belong into an environment apart. Rows of other networks
that are in the record already stay there.
"""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import crcbook as crc
from crcbook.checkpoints import read_json, write_json
from crcbook.experiments import environment
from crcbook.networks import Network, read_network

RECORD = Path(__file__).parents[1] / "book" / "results" / "benchmarks" / "peers.json"
HALVINGS, FARTHEST, STEPS = 12, 2.0, 20
TURNS, QUICK_TURNS, QUICK_SECONDS = 2, 5, 2.0
OURS = "default", "lines", "local", "parabolas"
NAMES = *OURS, "peer", "optimised"
MODULES = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softplus": nn.Softplus}
MISSING = (
    "auto_LiRPA cannot be imported ({error}): clone "
    "https://github.com/Verified-Intelligence/auto_LiRPA and put its folder on PYTHONPATH"
)


def in_turns(calls: dict[str, Callable]) -> dict[str, tuple]:
    """What each call returns, and the fewest of the processor's seconds that it takes."""
    found: dict[str, tuple] = {}
    for turn in range(QUICK_TURNS):
        for name, call in calls.items():
            if turn >= TURNS and found[name][1] > QUICK_SECONDS:
                continue
            started = time.process_time()
            answer = call()
            seconds = time.process_time() - started
            found[name] = answer, min(seconds, found.get(name, (None, seconds))[1])
    return found


def bisected(positive: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """The largest radii found at which a test holds, by halving [0, 2]."""
    low, high = torch.zeros(count), torch.full((count,), FARTHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        holds = positive(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low


def plain(network: Network) -> nn.Sequential:
    """The layers that were read, as the peer takes them."""
    modules: list[nn.Module] = []
    for layer in network.layers:
        linear = nn.Linear(*reversed(layer.weight.shape))
        with torch.no_grad():
            linear.weight.copy_(layer.weight)
            linear.bias.copy_(layer.bias)
        modules.append(linear)
        if layer.activation.name != "identity":
            modules.append(MODULES[layer.activation.name]())
    return nn.Sequential(*modules)


def peer_radii(network: Network, x: Tensor, y: Tensor, lirpa, optimised: bool = False) -> Tensor:
    """The radii of auto_LiRPA's CROWN, or of its alpha-CROWN."""
    bounded = lirpa.BoundedModule(plain(network), torch.zeros_like(x), verbose=False)
    bounded.set_bound_opts({"optimize_bound_args": {"iteration": STEPS}})
    method = "CROWN-Optimized" if optimised else "CROWN"
    eye = torch.eye(network.classes)
    others = [[k for k in range(network.classes) if k != label] for label in y.tolist()]
    margins = eye[y][:, None] - eye[torch.tensor(others)]

    def positive(radius: Tensor) -> Tensor:
        ball = lirpa.PerturbationLpNorm(norm=2, eps=radius[:, None])
        lower, _ = bounded.compute_bounds(
            x=(lirpa.BoundedTensor(x, ball),), C=margins, method=method, bound_upper=False
        )
        return lower.detach().amin(1) > 0

    return bisected(positive, len(x))


def compare(model: nn.Module, x: Tensor, y: Tensor, lirpa) -> dict:
    """Mean radii and seconds on some images of one network.

    Args:
        model: what :func:`crcbook.load_model` returned.
        x: ``(images, *shape)`` float64, all classified correctly.
        y: ``(images,)`` labels.
        lirpa: the module auto_LiRPA.

    Returns:
        The row of the record.
    """
    network = read_network(model, x[:1])
    # What a first call prepares belongs to the network.
    crc.certify(model, x[:1], y[:1], method="crown")
    crc.certify(model, x[:1], y[:1], curvature="local")
    flat = x.flatten(1).float()
    calls: dict[str, Callable] = {
        "default": lambda: crc.certify(model, x, y),
        "lines": lambda: crc.certify(model, x, y, method="crown"),
        "local": lambda: crc.certify(model, x, y, curvature="local"),
        "parabolas": lambda: crc.certify(model, x, y, method="parabolas"),
    }
    try:
        peer_radii(network, flat[:1], y[:1], lirpa)
        calls["peer"] = lambda: peer_radii(network, flat, y, lirpa)
        calls["optimised"] = lambda: peer_radii(network, flat, y, lirpa, optimised=True)
    except NotImplementedError:  # auto_LiRPA 0.7.1 has no relaxation of softplus
        pass
    found = in_turns(calls)
    default = found["default"][0]
    attacked = crc.attack(model, x, y, restarts=3).distance
    distance = torch.minimum(attacked, default.distance.nan_to_num(nan=torch.inf))
    row = {
        "widths": [layer.weight.shape[0] for layer in network.layers],
        "activation": network.layers[0].activation.name,
        "images": len(x),
        "attack": distance.mean().item(),
        **{name: found[name][0].radius.mean().item() for name in OURS},
        **{n: found[n][0].mean().item() if n in found else None for n in NAMES[len(OURS) :]},
        **{f"{name}, s": found[name][1] if name in found else None for name in NAMES},
    }
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}


def first_correct(model: nn.Module, test, count: int) -> tuple[Tensor, Tensor]:
    """The first test images that a model classifies correctly, in the shape that it takes."""
    kept_x: list[Tensor] = []
    kept_y: list[Tensor] = []
    for image, label in zip(test.x.double(), test.y, strict=True):
        for shape in ((28, 28), (1, 28, 28), (784,)):
            try:
                predicted = model.double()(image.reshape(1, *shape)).argmax(1)
            except (RuntimeError, ValueError, TypeError):
                continue
            if predicted == label:
                kept_x.append(image.reshape(shape))
                kept_y.append(label)
            break
        if len(kept_x) == count:
            break
    return torch.stack(kept_x), torch.stack(kept_y)


def main(arguments: list[str] | None = None) -> int:
    """Compare, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", type=Path, nargs="+", help="ONNX or safetensors files")
    parser.add_argument("--data", type=Path, help="torchvision root with MNIST")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--json", type=Path, default=RECORD, help="file to write")
    options = parser.parse_args(arguments)
    try:
        import auto_LiRPA as lirpa  # noqa: N813
    except ImportError as error:
        print(MISSING.format(error=error), file=sys.stderr)
        return 1
    if options.data:
        os.environ["CRCBOOK_DATA"] = str(options.data)
    torch.set_num_threads(1)
    test, rows = crc.load("mnist").test, {}
    if options.json.exists():
        rows = read_json(options.json)["rows"]
    columns = *NAMES, "attack", *(f"{name}, s" for name in NAMES)
    print(f"{'network':24}" + "".join(f"{name:>12}" for name in columns))
    for path in options.networks:
        model = crc.load_model(path)
        row = compare(model, *first_correct(model, test, options.images), lirpa)
        row["network"] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        row["peer version"] = f"auto_LiRPA {lirpa.__version__}"
        row["environment"] = environment("cpu")
        row["command"] = f"python benchmarks/peers.py {path.name} --images {options.images}"
        rows[path.stem] = row
        values = ("-" if row[name] is None else f"{row[name]:.3f}" for name in columns)
        print(f"{path.stem:24}" + "".join(f"{value:>12}" for value in values), flush=True)
        write_json(options.json, {"rows": rows, "halvings": HALVINGS, "seed of the attack": 0})
    return 0


if __name__ == "__main__":
    sys.exit(main())
