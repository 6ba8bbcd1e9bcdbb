"""Networks: what a certificate is about, how one is read out of a model, and how one is built."""

from crcbook.networks.building import architecture, deepen, mean_of, mlp, mlp_of, nearly_linear
from crcbook.networks.network import Layer, MarginAlong, Network, logit_margin, remembered
from crcbook.networks.reading import read_network, submodules, unchanged_buffers

__all__ = [
    "Layer",
    "MarginAlong",
    "Network",
    "architecture",
    "deepen",
    "logit_margin",
    "mean_of",
    "mlp",
    "mlp_of",
    "nearly_linear",
    "read_network",
    "remembered",
    "submodules",
    "unchanged_buffers",
]
