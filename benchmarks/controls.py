"""What the curvature adds to the training: ``python benchmarks/controls.py``.

From the records of the control experiments, whose trainings differ in gamma and in the seed alone:
mean and standard deviation over the seeds of each accuracy, in per cent, and between each two
networks of one seed the images certified by one of them alone, with the exact sign test.
"""

import argparse
import sys
from pathlib import Path

from crcbook.experiments import load_records
from crcbook.experiments.controls import (
    ACCURACIES,
    CONTROLS,
    by_gamma,
    comparisons,
    spread,
    with_deviation,
)

RECORDS = Path(__file__).parents[1] / "book" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--prefix", default=CONTROLS, help="of the experiments' names")
    options = parser.parse_args(arguments)
    groups = by_gamma(load_records(options.results), options.prefix)
    print(f"{'gamma':>7}{'seeds':>7}" + "".join(f"{name:>16}" for name in ACCURACIES))
    for gamma, rows in groups.items():
        cells = (with_deviation(*both, sign="+-") for both in spread(rows).values())
        print(f"{gamma:7g}{len(rows):7}" + "".join(f"{cell:>16}" for cell in cells))
    for low, high, seed, found in comparisons(groups):
        print(f"seed {seed}: certified at gamma {low:g} alone {found.first}, at {high:g} alone "
              f"{found.second}, p = {found.p_value:.2g}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
