"""A code of 2D positions that a linear map can read."""

import math

import torch

FREQUENCIES = 16  # a coordinate; the finest has a period of 1/64 of the image, below one patch of 560/14
CODE_SIZE = 4 * FREQUENCIES


def grid_centres(rows: int, columns: int, device: torch.device | None = None) -> torch.Tensor:
    """The centres of a grid of patches, row by row, `(rows * columns, 2)`: x and y in 0..1 of the image."""
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.cartesian_prod(y, x).view(-1, 2).flip(-1)


def sinusoidal_2d(points: torch.Tensor) -> torch.Tensor:
    """`points (..., 2)`, x and y in 0..1, to `(..., CODE_SIZE)`: sin and cos of 2 pi f x, then those of 2 pi f y.

    The frequencies f are geometric from 1/2 to 64.
    """
    f = torch.logspace(-1, 6, FREQUENCIES, base=2, device=points.device, dtype=points.dtype)
    angles = 2 * math.pi * points[..., None] * f
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
