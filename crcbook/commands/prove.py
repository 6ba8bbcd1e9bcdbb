"""``python -m crcbook prove``: what certificates rest on, in a file for ``check``."""

import argparse

from crcbook.commands import items
from crcbook.commands.arguments import path
from crcbook.commands.items import read_request
from crcbook.outputs import check_new
from crcbook.proof_file import prove

SUMMARY = "write what certified radii rest on to a file, for `check`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments.

    Args:
        parser: the command's.
    """
    items.add_network_and_items(parser)
    parser.add_argument("--out", type=path, metavar="FILE", required=True,
                        help="the file of proofs, .safetensors by custom")  # fmt: skip
    parser.set_defaults(method="dual", targets="all", radius=None)


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what was typed.

    Raises:
        RuntimeError: for a file that cannot be read or written.
        TypeError: for arrays of the wrong kind.
        ValueError: for a network that a proof file cannot name, or a file that exists.
    """
    asked = read_request(options)
    check_new(options.out)
    kind = {name: asked.options[name] for name in ("curvature", "box", "deployed")}
    written = prove(asked.model, asked.x, asked.y, options.out, **kind)
    for name, number in written.summary.items():
        print(f"{name:58} {number}")
    print(f"wrote {options.out}")
