"""The questions one can ask: how far an input can move, and whether a ball is safe."""

from crcbook.certificate.bounds import curvature_bounds
from crcbook.certificate.certificate import certify, verify, verify_by_kind
from crcbook.certificate.results import Certificate, Verdict

__all__ = ["Certificate", "Verdict", "certify", "curvature_bounds", "verify", "verify_by_kind"]
