"""The page on which a reader draws a digit and sees it certified: its data and its markup.

The page computes in the reader's browser, with no network: ``draw_proof.js`` holds the numerics,
``draw_sheet.js`` what one draws on, ``draw_page.js`` what one sees. Python proves what does not
depend on the digit, the curvature of each pair of classes, and hands over the weights.
"""

import base64
import json
import math
from importlib.resources import files
from pathlib import Path
from string import Template

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML
from torch import nn

from crcbook.activations import ACTIVATIONS
from crcbook.networks import Layer, read_network
from crcbook.proof.curvature import downward_curvature
from crcbook.proof.rounding import RoundingModel

NETWORK = "results/mnist-2-softplus-crt-long.safetensors"  # in the book's folder
SCRIPT = "draw_network.js"  # what :func:`network_script` is called in the built book
_SCRIPTS = ("draw_proof.js", "draw_sheet.js", "draw_page.js")
_SIDE = 28


def read_digits(path: str | Path) -> np.ndarray:
    """Read a sheet of digits: a row a class, ten of each, 28 by 28 pixels.

    Args:
        path: a PNG of 280 by 280 grey pixels.

    Returns:
        ``(10, 10, 28, 28)`` uint8: class, number in the class, row, column.

    Raises:
        ValueError: for a picture of another size.
    """
    picture = np.rint(plt.imread(path) * 255).astype(np.uint8)
    if picture.shape != (10 * _SIDE, 10 * _SIDE):
        raise ValueError(f"{path} must have 280 by 280 grey pixels; got {picture.shape}")
    return picture.reshape(10, _SIDE, 10, _SIDE).swapaxes(1, 2)


def draw_page(model: nn.Sequential, digits: np.ndarray) -> HTML:
    """The sheet to draw on, with all that it says about what is drawn.

    Args:
        model: the network whose script, :func:`network_script`, lies beside the page.
        digits: ``(10, 10, 28, 28)`` uint8 images to start from, as :func:`read_digits` gives them.

    Returns:
        HTML that loads that script, 4 MB, and nothing else.
    """
    package = files("crcbook.book")
    template = Template(package.joinpath("draw.html").read_text("utf-8"))
    weights = sum(parameter.numel() for parameter in model.parameters())
    scripts = (package.joinpath(name).read_text("utf-8") for name in _SCRIPTS)
    return HTML(
        template.substitute(
            network=f"_static/{SCRIPT}",
            bytes=4 * math.ceil(4 * weights / 3),
            digits=base64.b64encode(digits.tobytes()).decode("ascii"),
            script="\n".join(scripts),
        )
    )


def network_script(model: nn.Sequential) -> str:
    """A script that hands a network, and the constants of proofs about it, to ``draw_proof.js``.

    Args:
        model: one hidden layer of softplus units, its weights float32.

    Returns:
        JavaScript that assigns one object; a page opened from disk can load nothing but scripts.

    Raises:
        ValueError: for another kind of network.
    """
    network = read_network(model)
    first, last = network.layers[0], network.layers[-1]
    if len(network.layers) != 2 or not _is_plain_softplus(first) or len(first.bias) % 4:
        raise ValueError(
            "the page computes one hidden layer of softplus units, their number a multiple of 4"
        )
    rounding = RoundingModel.of(network)
    label, target = _pairs(network.classes)
    rows = network.margin_weights(label, target)
    data = {
        "inputs": network.inputs,
        "width": len(first.bias),
        "classes": network.classes,
        "curvature": _table(downward_curvature(network, label, target), network.classes),
        "rowNorm": _table(rows.norm(dim=1), network.classes),
        "deviation": _table(rounding.deviation(rows), network.classes),
        "spectralNorm": rounding.norms[0],
        "frobeniusNorm": rounding.frobenius[0],
        "maxSlope": first.activation.max_slope,
        "maxBend": first.activation.max_bend,
        "weights": _base64([first.weight, first.bias, last.weight, last.bias]),
    }
    return f"window.crcDrawNetwork = {json.dumps(data, separators=(',', ':'), allow_nan=False)};\n"


def _is_plain_softplus(layer: Layer) -> bool:
    """Whether a layer's units are softplus with beta 1, which the page's formulas assume."""
    row, plain = layer.activation, ACTIVATIONS["softplus"]
    return (row.name, row.max_bend) == (plain.name, plain.max_bend)


def _pairs(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every label with every other class, in the order of a table without its diagonal."""
    label = torch.arange(classes).repeat_interleave(classes)
    target = torch.arange(classes).repeat(classes)
    return label[label != target], target[label != target]


def _table(values: torch.Tensor, classes: int) -> list[list[float]]:
    """Values of :func:`_pairs` as a table; its diagonal, which nobody reads, is 0."""
    table = torch.zeros(classes, classes, dtype=torch.float64)
    table[_pairs(classes)] = values.cpu()
    return table.tolist()


def _base64(tensors: list[torch.Tensor]) -> str:
    """Float32 numbers, one tensor after the other; that they lose nothing is checked."""
    exact = torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy()
    single = exact.astype("<f4")
    if not np.array_equal(single, exact):
        raise ValueError("the page holds float32 weights; these are not")
    return base64.b64encode(single.tobytes()).decode("ascii")
