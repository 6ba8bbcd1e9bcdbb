"""Activations that someone wrote out, as torch's decompositions do: known by their parts."""

from collections.abc import Sequence

from torch import Tensor

from crcbook.activations import ACTIVATIONS, OTHER_ACTIVATIONS, Activation, celu, softplus
from crcbook.networks.affine import Affine
from crcbook.networks.operations import Piece, Step, divided_by

Steps = Sequence[Step]


def written_out(name: str, branches: Sequence[Steps]) -> tuple[Step, ...]:
    """The activation that a function makes of branches.

    Args:
        name: of the function, whose arguments the branches are, in order.
        branches: the steps of each from where they part.

    Returns:
        Its steps; none where the branches are no activation that is known.
    """
    match branches:
        case ([], curved) | (curved, []) if name == "mul":
            return _times_a_curve(curved)
        case (test, [], curved) if name == "where":
            return _above_a_threshold(test, curved)
        case [[], [Piece("abs"), Affine(name="add", facts=(Tensor() as one,))]] if name == "div":
            return (OTHER_ACTIVATIONS["softsign"],) if (one == 1).all() else ()
        case [
            [Piece("minimum", 0)],
            [Piece("abs"), Affine(name="neg"), Piece("exp"), Piece("log1p")],
        ] if name == "sub":
            return (OTHER_ACTIVATIONS["logsigmoid"],)
    return ()


def _times_a_curve(curved: Steps) -> tuple[Step, ...]:
    """What z times a function of it is."""
    match curved:
        case [Activation(name="sigmoid")]:
            return (ACTIVATIONS["silu"],)
        case [Affine(name="mul", facts=(scale,)) as scaled, Activation(name="sigmoid")]:
            # z sigmoid(bz) is silu(bz) / b.
            return (scaled, ACTIVATIONS["silu"], divided_by(scale)) if (scale != 0).all() else ()
        case [Activation(name="softplus", settings=settings), Activation(name="tanh")]:
            usual = settings == ACTIVATIONS["softplus"].settings
            return (OTHER_ACTIVATIONS["mish"],) if usual else ()
    return ()


def _above_a_threshold(test: Steps, curved: Steps) -> tuple[Step, ...]:
    """What is z where it passes a test, and a function of z elsewhere."""
    match test, curved:
        case [Piece("gt", float() as threshold)], [Piece("exp"), Piece("log1p")]:
            return (softplus(1.0, threshold),)
        case (
            [Affine(name="mul", facts=(Tensor() as beta,)) as scaled, Piece("gt", float() as end)],
            [again, Piece("exp"), Piece("log1p"), Affine(name="div", facts=(Tensor() as divisor,))],
        ):
            same = again is scaled and _same_number(beta, divisor)
            return (softplus(float(beta), end),) if same else ()
        case (
            [Piece("gt", 0)],
            [
                Affine(name="div", facts=(Tensor() as alpha,)),
                Piece("expm1"),
                Affine(name="mul", facts=(Tensor() as factor,)),
            ],
        ):
            return (celu(float(alpha)),) if _same_number(alpha, factor) else ()
    return ()


def _same_number(first: Tensor, second: Tensor) -> bool:
    return first.dim() == second.dim() == 0 and bool(first == second)
