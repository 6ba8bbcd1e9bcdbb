"""Named, recorded experiments: every network of the book's tables comes from one of these.

``python -m crcbook reproduce`` runs what is missing.
"""

from crcbook.experiments.catalogue import PROFILES, Experiment, drawn_anew, experiments
from crcbook.experiments.evaluation import evaluate, summary
from crcbook.experiments.paired import Paired, paired
from crcbook.experiments.records import (
    RADIUS_UNIT,
    certified_shares,
    decode_bits,
    decode_radii,
    encode_bits,
    encode_radii,
    environment,
    load_records,
)
from crcbook.experiments.reproduce import reproduce, run_training

__all__ = [
    "PROFILES",
    "RADIUS_UNIT",
    "Experiment",
    "Paired",
    "certified_shares",
    "decode_bits",
    "decode_radii",
    "drawn_anew",
    "encode_bits",
    "encode_radii",
    "environment",
    "evaluate",
    "experiments",
    "load_records",
    "paired",
    "reproduce",
    "run_training",
    "summary",
]
