"""What a certificate of the float32 program costs in radius: ``python benchmarks/deployed.py``.

The same test images are certified in real arithmetic and as torch's float32 program computes them,
whatever the order of its sums (``deployed="float32"``).
"""

import argparse
import sys
from pathlib import Path

import crcbook as crc
from crcbook.checkpoints import write_json
from crcbook.experiments import environment


def main(arguments: list[str] | None = None) -> int:
    """Certify twice and print what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a .safetensors model of crcbook")
    parser.add_argument("--dataset", default="mnist", help="whose test images")
    parser.add_argument("--images", type=int, help="how many; all where not given")
    parser.add_argument("--radius", type=float, default=1.58, help="to count certified images at")
    parser.add_argument("--json", type=Path, help="write a record here")
    options = parser.parse_args(arguments)
    model, test = crc.load_model(options.model), crc.load(options.dataset).test
    test = test.take(slice(0, options.images))
    real, program = (
        crc.certify(model, test.x, test.y, method="dual", deployed=deployed).radius
        for deployed in (None, "float32")
    )
    share = program[real > 0] / real[real > 0]
    record = {
        "network": options.model.stem,
        "dataset": options.dataset,
        "images": len(test),
        "mean share of the radius left": share.mean().item(),
        "smallest share": share.min().item(),
        "radius": options.radius,
        "certified": int((real >= options.radius).sum()),
        "certified, float32 program": int((program >= options.radius).sum()),
        "environment": environment("cpu"),
        "command": " ".join(["python benchmarks/deployed.py", *(arguments or sys.argv[1:])]),
    }
    for name, value in record.items():
        print(f"{name:32} {value}")
    if options.json:
        write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
