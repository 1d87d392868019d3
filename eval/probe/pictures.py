"""Pictures of what a tower sees: its tokens as colours, and what looks like a region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ...mllm.boxes import Boxes
from ...mllm.draw import draw_boxes
from ...train_stages.normalise import PixelNorm
from ...train_stages.pixels import PixelCache
from ...vision_towers import describe_tower, encode_regions

SIDE = 224  # pixels of each picture in the sheet
GAP = 6


@torch.inference_mode()
def pca_sheet(tower: PreTrainedModel, cache: PixelCache, rows: Sequence[int]) -> Image.Image:
    """Each image beside its tokens, whose three largest principal components (over all of these images) are red, green
    and blue; the tokens are those of the default feature layer."""
    spec = describe_tower(tower.config)
    pixels = _normalised(tower, cache, rows)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[spec.default_feature_layer]
    tokens = hidden[:, min(1, spec.num_prefix_tokens) :]
    grids = token_colours(tokens).unflatten(1, spec.grid(*pixels.shape[-2:])).cpu().numpy()
    return _sheet([[_picture(cache, row), _enlarged(grid)] for row, grid in zip(rows, grids, strict=True)])


@torch.inference_mode()
def similarity_sheet(tower: PreTrainedModel, cache: PixelCache, rows: Sequence[int]) -> Image.Image:
    """Each image with its first region outlined, beside the cosine between that region's embedding and those of boxes
    around every patch, bright where it is large. All are read by the tower's own region readout."""
    spec = describe_tower(tower.config)
    pixels = _normalised(tower, cache, rows)
    grid = spec.grid(*pixels.shape[-2:])
    patches = patch_boxes(grid, spec.patch_size)
    pairs = []
    for index, row in enumerate(rows):
        first, kept = cache.frames[row].to_input(Boxes([r.box_xyxy for r in cache.records[row].regions[:1]]))
        if not len(kept):
            continue
        both = torch.cat([first.tensor(), patches])
        embeds = encode_regions(tower, pixels[index : index + 1], [both])[0]
        cosine = cosine_to_first(embeds).unflatten(0, grid)
        pairs.append(
            [
                draw_boxes(_picture(cache, row), Boxes(first.xyxy * (SIDE / pixels.shape[-1]))),
                _enlarged(heat_colours(cosine)),
            ]
        )
    return _sheet(pairs)


def token_colours(tokens: Tensor) -> Tensor:
    """The three largest principal components of `(B, N, D)` tokens, over all of them, as colours 0-1: `(B, N, 3)`. The
    outermost hundredths are cut off."""
    flat = tokens.flatten(0, 1).float()
    flat = flat - flat.mean(dim=0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    parts = flat @ axes[:3].T
    low, high = parts.quantile(0.01, dim=0), parts.quantile(0.99, dim=0)
    return ((parts - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).unflatten(0, tokens.shape[:2])


def cosine_to_first(embeds: Tensor) -> Tensor:
    """`(1 + N, D)` region embeddings -> `(N,)` cosines of the others to the first."""
    unit = F.normalize(embeds.float(), dim=-1)
    return unit[1:] @ unit[0]


def heat_colours(values: Tensor) -> np.ndarray:
    """`(rows, columns)` values, the least dark blue and the largest yellow: `(rows, columns, 3)` 0-1."""
    low, high = values.min(), values.max()
    return _viridis(((values - low) / (high - low).clamp(min=1e-6)).cpu().numpy())


def patch_boxes(grid_hw: tuple[int, int], patch_size: int, around: int = 3) -> Tensor:
    """A box of `around` x `around` patches about every patch, cut off at the border: `(rows * columns, 4)` xyxy in
    input pixels, row by row. A single patch holds too little to be like anything."""
    rows, columns = grid_hw
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    x1, x2 = (x - around / 2).clamp(min=0), (x + around / 2).clamp(max=columns)
    y1, y2 = (y - around / 2).clamp(min=0), (y + around / 2).clamp(max=rows)
    return torch.stack([x1, y1, x2, y2], dim=-1).flatten(0, 1) * patch_size


def _normalised(tower: PreTrainedModel, cache: PixelCache, rows: Sequence[int]) -> Tensor:
    spec = describe_tower(tower.config)
    norm = PixelNorm(spec.image_mean, spec.image_std).to(tower.device)
    return norm(torch.from_numpy(cache.pixels[list(rows)]).to(tower.device))


def _picture(cache: PixelCache, row: int) -> Image.Image:
    picture = Image.fromarray(np.array(cache.pixels[row]).transpose(1, 2, 0))
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _enlarged(grid: np.ndarray) -> Image.Image:
    return Image.fromarray((grid * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _viridis(values: np.ndarray) -> np.ndarray:
    import matplotlib

    colours: Any = matplotlib.colormaps["viridis"](values)
    return colours[..., :3]


def _sheet(pairs: Sequence[Sequence[Image.Image]], columns: int = 3) -> Image.Image:
    """Pairs side by side, `columns` of them in a row."""
    width, height = 2 * SIDE + GAP, SIDE + GAP
    rows = max(1, -(-len(pairs) // columns))
    sheet = Image.new("RGB", (columns * (width + 2 * GAP), rows * height), "white")
    for number, pair in enumerate(pairs):
        left, top = (number % columns) * (width + 2 * GAP), (number // columns) * height
        for place, picture in enumerate(pair):
            sheet.paste(picture, (left + place * (SIDE + GAP), top))
    return sheet
