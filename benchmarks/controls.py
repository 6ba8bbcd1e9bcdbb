"""What the curvature adds to the training: ``python benchmarks/controls.py``.

From the records of the control experiments, whose trainings differ in gamma and in the seed alone:
mean and standard deviation over the seeds of each accuracy, in per cent, and between each two
networks of one seed the images certified by one of them alone, with the exact sign test.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

from crcbook.experiments import Paired, decode_bits, load_records, paired

RECORDS = Path(__file__).parents[1] / "book" / "results"
PREFIX = "mnist-2-softplus-crt-control-gamma-"
ACCURACIES = {
    "clean": "clean_accuracy",
    "certified": "certified_accuracy",
    "globally": "certified_accuracy_global",
    "survived": "empirical_accuracy",
}


def by_gamma(records: dict[str, dict], prefix: str = PREFIX) -> dict[float, list[dict]]:
    """The records whose names begin with the prefix, by gamma in its order, each in seeds' order.

    Args:
        records: by name, as :func:`crcbook.experiments.load_records` has them.
        prefix: of the names.

    Returns:
        Lists of records by gamma.
    """
    chosen = [record for name, record in records.items() if name.startswith(prefix)]
    chosen.sort(key=lambda record: (record["recipe"]["gamma"], record["seed"]))
    groups = itertools.groupby(chosen, key=lambda record: record["recipe"]["gamma"])
    return {gamma: list(group) for gamma, group in groups}


def spread(rows: list[dict]) -> dict[str, tuple[float, float | None]]:
    """Means and standard deviations over the seeds, in per cent; of one seed there is no second."""
    found = {}
    for name, key in ACCURACIES.items():
        values = [100 * row[key] for row in rows]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found[name] = statistics.mean(values), deviation
    return found


def comparisons(groups: dict[float, list[dict]]) -> list[tuple[float, float, int, Paired]]:
    """Each two gammas at each seed that both have: the certified images of one against the other's.

    Args:
        groups: what :func:`by_gamma` returned.

    Returns:
        The two gammas, the seed and the comparison.
    """
    found = []
    for (low, first), (high, second) in itertools.combinations(groups.items(), 2):
        bits = [{row["seed"]: _certified(row) for row in rows} for rows in (first, second)]
        for seed in sorted(set(bits[0]) & set(bits[1])):
            found.append((low, high, seed, paired(bits[0][seed], bits[1][seed])))
    return found


def _certified(record: dict):
    return decode_bits(record["bits"]["certified"], record["images"])


def main(arguments: list[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--prefix", default=PREFIX, help="of the experiments' names")
    options = parser.parse_args(arguments)
    groups = by_gamma(load_records(options.results), options.prefix)
    print(f"{'gamma':>7}{'seeds':>7}" + "".join(f"{name:>16}" for name in ACCURACIES))
    for gamma, rows in groups.items():
        cells = (
            f"{mean:.2f}" if deviation is None else f"{mean:.2f} +- {deviation:.2f}"
            for mean, deviation in spread(rows).values()
        )
        print(f"{gamma:7g}{len(rows):7}" + "".join(f"{cell:>16}" for cell in cells))
    for low, high, seed, found in comparisons(groups):
        print(f"seed {seed}: certified at gamma {low:g} alone {found.first}, at {high:g} alone "
              f"{found.second}, p = {found.p_value:.2g}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
