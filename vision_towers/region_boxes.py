"""Checks on the boxes that enter a tower, and the box -> patches rule."""

import torch

from .errors import UserError

MASK_RULES = ("centre", "overlap")
HALF_PRECISION = (torch.float16, torch.bfloat16)


def check_boxes(boxes: torch.Tensor, region_counts: torch.Tensor | None, batch_size: int) -> torch.Tensor:
    """Validate padded boxes and return `region_counts (B,)` (all rows, when none are given).

    Raises:
        UserError: boxes of the wrong shape or in half precision. Half precision moves box edges by whole pixels at
            560 px, so it is refused rather than silently accepted.
    """
    if not isinstance(boxes, torch.Tensor):
        raise UserError(f"boxes must be one padded tensor (B, R, 4), got {type(boxes).__name__}; see pad_boxes.")
    if boxes.ndim != 3 or boxes.shape[-1] != 4 or boxes.shape[0] != batch_size:
        raise UserError(f"boxes must be (B={batch_size}, R, 4) xyxy in input pixels, got {tuple(boxes.shape)}.")
    if boxes.dtype not in (torch.float32, torch.float64):
        raise UserError(f"boxes must be float32, got {boxes.dtype}; half precision moves their edges.")
    if region_counts is None:
        return torch.full((batch_size,), boxes.shape[1], device=boxes.device)
    if region_counts.shape != (batch_size,):
        raise UserError(f"region_counts must be (B={batch_size},), got {tuple(region_counts.shape)}.")
    return region_counts.to(boxes.device)


def patch_grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of a batch `(B, 3, H, W)`.

    Raises:
        UserError: not a batch of images, or images smaller than a patch.
    """
    if pixel_values.ndim != 4 or min(pixel_values.shape[-2:]) < patch_size:
        raise UserError(
            f"pixel_values must be (B, 3, H, W) with sides of at least a patch ({patch_size} px), "
            f"got {tuple(pixel_values.shape)}."
        )
    return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


def valid_rows(region_counts: torch.Tensor, rows: int) -> torch.Tensor:
    """`(B, rows)` bool: True where a row of the padded boxes is a real region."""
    return torch.arange(rows, device=region_counts.device)[None] < region_counts[:, None]


def patches_in_boxes(boxes: torch.Tensor, grid_hw: tuple[int, int], patch_size: int, rule: str) -> torch.Tensor:
    """Which patches belong to which box.

    The paper (RICE, Eq. 2) says "token t is inside region l" and not how that is decided; we take a patch whose centre
    lies in the box (`centre`), or every patch the box touches (`overlap`). A box that holds no patch by its rule gets
    the patch nearest to its centre: an empty row would be a softmax over nothing.

    Args:
        boxes: `(B, R, 4)` float32 xyxy in input pixels.
        grid_hw: rows and columns of patches.
        patch_size: pixels.
        rule: "centre" or "overlap".
    Returns:
        `(B, R, rows * columns)` bool, at least one True in each row.
    """
    rows, columns = grid_hw
    y = (torch.arange(rows, device=boxes.device, dtype=boxes.dtype) + 0.5) * patch_size
    x = (torch.arange(columns, device=boxes.device, dtype=boxes.dtype) + 0.5) * patch_size
    x1, y1, x2, y2 = (edge[..., None] for edge in boxes.unbind(-1))
    if rule == "overlap":  # touching edges alone is no overlap
        reach = patch_size / 2
        in_x = (x + reach > x1) & (x - reach < x2)
        in_y = (y + reach > y1) & (y - reach < y2)
    else:
        in_x = (x >= x1) & (x <= x2)
        in_y = (y >= y1) & (y <= y2)
    inside = (in_y[..., :, None] & in_x[..., None, :]).flatten(-2)

    centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
    distance = ((y - centre_y) ** 2)[..., :, None] + ((x - centre_x) ** 2)[..., None, :]
    nearest = torch.zeros_like(inside).scatter_(-1, distance.flatten(-2).argmin(-1, keepdim=True), True)
    return torch.where(inside.any(-1, keepdim=True), inside, nearest)
