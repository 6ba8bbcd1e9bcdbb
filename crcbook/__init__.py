"""Provable robustness by curvature: bounds, certificates and training."""

from crcbook.activations import ACTIVATIONS, Arctan
from crcbook.attacks import Attack, attack
from crcbook.certificate import Certificate, Verdict, certify, curvature_bounds, verify
from crcbook.checkpoints import load_model, save_model
from crcbook.datasets import Split, load, split_validation
from crcbook.networks import mlp
from crcbook.proof_file import prove
from crcbook.training import Recipe, train

__all__ = [
    "ACTIVATIONS",
    "Arctan",
    "Attack",
    "Certificate",
    "Recipe",
    "Split",
    "Verdict",
    "attack",
    "certify",
    "curvature_bounds",
    "load",
    "load_model",
    "mlp",
    "prove",
    "save_model",
    "split_validation",
    "train",
    "verify",
]
