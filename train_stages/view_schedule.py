"""What sizes a tower takes, and a schedule of them within one run: small views first, large ones later.

RICE is trained at 224 px and then on larger inputs (rice paper, section 3.2); that the change happens within a run, and
its shares, are ours. A tower with rotary positions takes any size that its patches divide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..vision_towers import TowerSpec
from ..vision_towers.errors import UserError

Batch = dict[str, Any]


def check_size(key: str, side: int, spec: TowerSpec) -> None:
    """Whether a tower takes squares of `side` pixels: those of its own size, and of any multiple of the patch if it
    takes any resolution. key: of the recipe, that says so.

    Raises UserError when it does not.
    """
    if side == spec.image_size:  # which need not be a multiple: SigLIP so400m has patches of 14 px in 384
        return
    if not spec.any_resolution:
        raise UserError(f"{key} is {side}, but this tower takes {spec.image_size} px images only.")
    if side % spec.patch_size:
        raise UserError(f"{key} is {side}, it must be a multiple of the tower's patch size {spec.patch_size}.")


def view_schedule(steps: Sequence[tuple[float, int]], view: int, spec: TowerSpec) -> Callable[[Batch, float], Batch]:
    """What shrinks a batch of stage 0 to the size that its time in the run asks for.

    steps: (share of the run, pixels), ascending shares below 1: until that share, views have so many pixels; after the
        last, `view`, as they come from the data.
    Raises UserError for shares or sizes that cannot be.
    """
    shares = [share for share, _ in steps]
    if shares != sorted(set(shares)) or not all(0 < share < 1 for share in shares):
        raise UserError(f"data.view_schedule: the shares are {shares}, they must ascend between 0 and 1.")
    for _, side in steps:
        if side % spec.patch_size or side > view:
            raise UserError(
                f"data.view_schedule: {side} px is no size; it must be a multiple of the patch, {spec.patch_size}, and "
                f"at most the view's {view}."
            )
    if not spec.any_resolution:
        raise UserError("data.view_schedule: this tower takes one input size only.")

    def shrunk(batch: Batch, progress: float) -> Batch:
        side = next((side for share, side in steps if progress < share), view)
        return batch if side == batch["pixel_values"].shape[-1] else shrink(batch, side, spec.patch_size)

    return shrunk


def shrink(batch: Batch, side: int, patch_size: int) -> Batch:
    """The batch with views of `side` px: pixels by bilinear interpolation with antialiasing, boxes in the new pixels,
    and `masks`, shares of patches, as shares of the new patches (exact where these are whole numbers of the old)."""
    pixels = batch["pixel_values"]  # uint8 (B, 3, S, S)
    smaller = F.interpolate(pixels.float(), size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    found = {**batch, "pixel_values": smaller.round_().clamp_(0, 255).to(torch.uint8)}
    if "boxes" in batch:
        found["boxes"] = batch["boxes"] * (side / pixels.shape[-1])
    if "masks" in batch:
        found["masks"] = F.interpolate(batch["masks"], size=(side // patch_size,) * 2, mode="area")
    return found
