"""Branches that meet again: what is computed side by side from the same items, and joined.

An item less its mean, a residual block, or layers whose outputs are put beside each other are
taken as a chain: the item is copied for every branch, each step of a branch works on its copy and
leaves the others as they are, and the last step joins them. Activations are applied to all
branches at once, the first of each, then the second; a branch without so many is done by then, and
carried by the identity. So nothing but chains is ever multiplied out, and their rounding bounds
hold.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from crcbook.activations import IDENTITY, Activation
from crcbook.networks.affine import Affine, shape_after
from crcbook.networks.mixed import mixed

Parts = list[Tensor]


def joined(
    name: str,
    branches: Sequence[Sequence[Affine | Activation]],
    shape: Sequence[int],
    join: Callable[[Parts], Tensor],
    magnitude: Callable[[Parts], Tensor],
    facts: tuple = (),
    terms: int = 0,
) -> tuple[Affine | Activation, ...]:
    """Branches and what joins them, as one chain.

    Args:
        name: what torch calls the function that joins them.
        branches: the steps of each, all from the same items; none for the items themselves.
        shape: of an item that they take.
        join: a linear function of the branches' results, ``(batch, *shape)`` each.
        magnitude: the same with the sizes of its coefficients, all of which are 0, 1 or -1.
        facts: what tells the function from others of its name.
        terms: how many roundings an entry of its takes.

    Returns:
        The steps.
    """
    count = len(branches)
    shapes = [torch.Size(shape)] * count

    def copies(a: Tensor) -> Tensor:
        return a.reshape(len(a), -1).repeat(1, count)

    steps: list[Affine | Activation] = [
        Affine("branches", copies, copies, facts=(count, tuple(shape)))
    ]
    pieces = [_between_activations(branch) for branch in branches]
    for number in range(max(map(len, pieces))):
        rows = [IDENTITY] * count
        for place, branch in enumerate(pieces):
            maps, row = branch[number] if number < len(branch) else ((), IDENTITY)
            for step in maps:
                steps.append(_beside(step, shapes, place))
                shapes[place] = shape_after(step, shapes[place])
            rows[place] = row
        sizes = [size.numel() for size in shapes]
        steps.append(mixed([*zip(rows, sizes, strict=True)]))
    steps.pop()  # that of the ends, all of which are the identity
    parts = partial(_parts, shapes=tuple(shapes))
    end = Affine(
        name,
        lambda a: join(parts(a)),
        lambda a: magnitude(parts(a)),
        terms,
        facts=(*facts, tuple(map(tuple, shapes))),
    )
    return (*steps, end)


def _between_activations(
    branch: Sequence[Affine | Activation],
) -> list[tuple[list[Affine], Activation]]:
    """The affine steps up to each activation, with it, and up to the end, with the identity."""
    pieces: list[tuple[list[Affine], Activation]] = []
    maps: list[Affine] = []
    for step in branch:
        if isinstance(step, Affine):
            maps.append(step)
        else:
            pieces.append((maps, step))
            maps = []
    return [*pieces, (maps, IDENTITY)]


def _parts(a: Tensor, shapes: Sequence[torch.Size]) -> Parts:
    """Items of several shapes that lie beside each other."""
    sizes = [shape.numel() for shape in shapes]
    return [
        part.reshape(len(a), *shape)
        for part, shape in zip(a.split(sizes, dim=1), shapes, strict=True)
    ]


def _beside(step: Affine, shapes: Sequence[torch.Size], place: int) -> Affine:
    """A step on one of several items that lie beside each other."""
    before, after = tuple(shapes), shape_after(step, shapes[place])

    def lifted(function: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
        parts = _parts(a, before)
        parts[place] = function(parts[place])
        return torch.cat([part.reshape(len(a), -1) for part in parts], dim=1)

    shift = step.shift
    if shift is not None:
        sizes = [shape.numel() for shape in before]
        sizes[place] = after.numel()
        padded = [torch.zeros(size, dtype=torch.float64, device="cpu") for size in sizes]
        padded[place] = shift.expand(after).flatten()
        shift = torch.cat(padded)
    return Affine(
        step.name,
        partial(lifted, step.linear),
        partial(lifted, step.magnitude),
        step.terms,
        step.stored,
        shift,
        facts=(*step.facts, "branch", place, tuple(map(tuple, before))),
    )
