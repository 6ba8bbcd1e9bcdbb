"""How a network is trained: every choice there is, with its default."""

import math
from dataclasses import dataclass, fields
from typing import cast

METHODS = (
    "standard", "adversarial", "crt", "crt-published", "ibp", "crown-ibp", "lipschitz",
)  # fmt: skip
CHOICES = {
    "method": METHODS,
    "attack_dtype": ("float32", "bfloat16"),
    "curvature": ("global", "local", "pointwise"),
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        method: ``"standard"`` (cross-entropy at the data), ``"adversarial"`` (at an attacked
            point), ``"crt"`` (there, plus ``gamma`` times the largest curvature),
            ``"crt-published"`` (the runner-up's attack and curvature, as in the paper), or the
            worst margins of ``"ibp"``, ``"crown-ibp"`` (monotone activations only) or
            ``"lipschitz"``.
        radius: the l2 radius that the network is for, and is validated at, in the units of the
            input.
        reach: the radius of the balls trained on, as a multiple of ``radius``.
        gamma: the weight of the curvature; only CRT uses it.
        epochs: passes over the data.
        batch_size: items a step.
        learning_rate: Adam's peak rate; it rises over the first 30 % of the steps and falls to 0.
        ramp_epochs: epochs over which the balls grow to their radius.
        average: how much of the averaged weights a step keeps, such as 0.995; these are the ones
            validated and returned. 0 for the weights themselves.
        attack_steps: gradients an attack.
        attack_box: keep attacked points between 0 and 1, where pixels are; ``"crt"`` and
            ``"adversarial"`` only.
        attack_dtype: the precision of the attack's gradients; ``"bfloat16"`` is faster, and counts
            as float32 where :func:`knows_bfloat16` says no.
        augment: shift, turn and scale the training images a little, anew in every epoch.
        mirror: mirror about half of the training images, left to right, anew in every epoch, which
            suits photographs and no digits.
        centred: take the gradients of a layer about the mean of its inputs at the start (Montavon
            & Müller 2012), without which a layer that follows a nearly linear one learns slowly.
        curvature: where CRT bounds it, ``"global"`` (over all of R^n), ``"local"`` (over a ball
            around one item a step), or ``"pointwise"`` (with the slopes that the layers have at
            one item a step and bends as anywhere), about what a parabola has to bend that touches
            the margin there. The validation certifies by global curvature for the first one, else
            by local curvature the first 500 items.
        ball: the radius of that ball, as a share of the attack's. Half of it is what a local
            certificate meets on its way; with more layers the curvature of the whole ball can be
            many times as large.
        curvature_every: steps between two gradients of the curvature, each of which serves until
            the next; more than a few can be unstable.
        loss_q: q of the generalised cross-entropy :math:`(1 - p_y^q)/q` (Zhang & Sabuncu 2018),
            bounded by 1/q, so that hopeless items count less; 0 is the cross-entropy.
        validate_every: epochs between two validations; the last epoch always has one.
            IBP and CROWN-IBP are validated by the bound they train, as the training evaluates it.
        seed: the seed of the order of the data.
    """

    method: str = "crt"
    radius: float = 1.58
    reach: float = 1.0
    gamma: float = 0.06
    epochs: int = 18
    batch_size: int = 256
    learning_rate: float = 3e-3
    ramp_epochs: float = 2.0
    average: float = 0.0
    attack_steps: int = 8
    attack_box: bool = False
    attack_dtype: str = "float32"
    augment: bool = False
    mirror: bool = False
    centred: bool = False
    curvature: str = "global"
    ball: float = 0.5
    curvature_every: int = 1
    loss_q: float = 0.0
    validate_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        for field in fields(self):
            value, kind = getattr(self, field.name), cast(type, field.type)
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{field.name} must be of type {kind.__name__}; got {value!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        for name in ("radius", "reach", "epochs", "batch_size", "learning_rate", "attack_steps",
                     "ball", "curvature_every", "validate_every"):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be at least 0 and below 1; got {self.average}")
        for name in ("gamma", "ramp_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if not 0 <= self.loss_q <= 1:
            raise ValueError(f"loss_q must be from 0 to 1; got {self.loss_q}")
        if self.attack_box and self.method not in ("crt", "adversarial"):
            raise ValueError(f"attack_box needs the method crt or adversarial; got {self.method}")
