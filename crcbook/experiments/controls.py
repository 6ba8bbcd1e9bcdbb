"""What one ingredient of a training adds: records that differ in gamma and in the seed alone."""

import itertools
import statistics

from crcbook.experiments.paired import Paired, paired
from crcbook.experiments.records import decode_bits

CONTROLS = "mnist-2-softplus-crt-control-gamma-"
ACCURACIES = {
    "clean": "clean_accuracy",
    "certified": "certified_accuracy",
    "globally": "certified_accuracy_global",
    "survived": "empirical_accuracy",
}


def by_gamma(records: dict[str, dict], prefix: str = CONTROLS) -> dict[float, list[dict]]:
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
    """Means and standard deviations over the seeds, in per cent; of one seed there is no second.

    Args:
        rows: records, a seed each.

    Returns:
        A pair for each name in ``ACCURACIES``.
    """
    found = {}
    for name, key in ACCURACIES.items():
        values = [100 * row[key] for row in rows]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found[name] = statistics.mean(values), deviation
    return found


def with_deviation(mean: float, deviation: float | None, sign: str = "±") -> str:
    """A mean and its standard deviation in words of a table.

    Args:
        mean: in per cent.
        deviation: of it; None where there is none.
        sign: what stands between the two.

    Returns:
        The text.
    """
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} {sign} {deviation:.2f}"


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
