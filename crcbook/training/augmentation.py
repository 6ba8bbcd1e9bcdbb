"""Training images shifted, turned, scaled a little or mirrored, anew in every epoch."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

_PIXELS, _TURN, _SCALE = 1.0, 0.1, 0.05  # the most of a shift, of a turn in radians, of a scaling
_CHUNK = 1000  # images at a time, so that memory is bounded


def augmented(x: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Images under small random similarities of the plane, interpolated, with zeros from outside.

    Args:
        x: ``(items, n)``.
        shape: of an image, ``(height, width)`` or ``(channels, height, width)``.
        seed: of the shifts, the turns and the scalings.

    Returns:
        ``(items, n)``.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = shape[-2:]
    parts = []
    for part in x.split(_CHUNK):
        across, down, turn, scale = (
            2 * torch.rand(4, len(part), generator=generator, device="cpu") - 1
        ).to(part)
        turn, scale = _TURN * turn, 1 + _SCALE * scale
        cosine, sine = turn.cos() / scale, turn.sin() / scale
        rows = (
            (cosine, -sine, 2 * _PIXELS / width * across),
            (sine, cosine, 2 * _PIXELS / height * down),
        )
        moved = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
        images = part.reshape(len(part), -1, height, width)
        grid = affine_grid(moved, list(images.shape), align_corners=False)
        parts.append(grid_sample(images, grid, align_corners=False).reshape(part.shape))
    return torch.cat(parts)


def mirrored(x: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Images of which about half are mirrored, left to right.

    Args:
        x: ``(items, n)``.
        shape: of an image, ``(height, width)`` or ``(channels, height, width)``.
        seed: of the choice.

    Returns:
        ``(items, n)``.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(x), 1, generator=generator, device="cpu").to(x.device) < 0.5
    return torch.where(chosen, x.reshape(len(x), -1, shape[-1]).flip(2).reshape(x.shape), x)


def is_image(shape: torch.Size) -> bool:
    """Whether items of this shape can be augmented."""
    return len(shape) in (2, 3) and math.prod(shape[-2:]) > 1
