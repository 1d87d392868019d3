"""A tower's features of the regions of a record set, batch by batch."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..mllm.boxes import Boxes, ImageFrame, mean_colour
from ..vision_towers import UserError, describe_tower, encode_regions
from .augment import cut_square, square_around
from .normalise import PixelNorm
from .pixels import PixelCache
from .records import Mask

CROP_MARGIN = 1.05  # side of a cut-out square, in units of the region's longer side


@torch.inference_mode()
def region_features(
    tower: PreTrainedModel,
    cache: PixelCache,
    rows: Sequence[int],
    boxes: Sequence[Boxes],
    batch_size: int,
    progress: str | None = None,
) -> Iterator[Tensor]:
    """The embeddings `(R_i, region_dim)` (float32, as the tower gives them) of each image, in the order of `rows`.

    Args:
        tower: with a region readout; it is put in eval mode and stays where it is.
        rows: images of `cache`. boxes: for each of them its boxes, xyxy in input pixels.
        progress: what a progress bar says; none without it.
    """
    tower.eval()
    spec, device = describe_tower(tower.config), tower.device
    norm = PixelNorm(spec.image_mean, spec.image_std).to(device)
    for start in tqdm(range(0, len(rows), batch_size), progress, unit="batch", disable=progress is None):
        part = slice(start, start + batch_size)
        pixels = torch.from_numpy(cache.pixels[list(rows[part])]).to(device)
        for embeds in encode_regions(tower, norm(pixels), [each.tensor() for each in boxes[part]]):
            yield embeds.float()


@torch.inference_mode()
def crop_features(
    tower: PreTrainedModel,
    cache: PixelCache,
    rows: Sequence[int],
    boxes: Sequence[Boxes],
    batch_size: int,
    progress: str | None = None,
    *,
    side: int | None = None,
    masks: Sequence[Sequence[Mask | None]] | None = None,
) -> Iterator[Tensor]:
    """The pooled features `(R_i, hidden_size)` (float32) of the regions of each image, each cut out as a square and
    resized to `side` pixels (the tower's own size when absent). Arguments as in `region_features`.

    masks: for each image the masks of its boxes, in original pixels; what lies outside of one is filled with the
        tower's mean colour. None: nothing is filled.
    """
    tower.eval()
    spec, device = describe_tower(tower.config), tower.device
    norm = PixelNorm(spec.image_mean, spec.image_std).to(device)
    fill = torch.tensor(mean_colour(spec.image_mean), dtype=torch.uint8)[:, None, None]
    size = cache.pixels.shape[-1]

    def crops() -> Iterator[Tensor]:
        for index, (row, of_image) in enumerate(zip(rows, boxes, strict=True)):
            pixels = torch.from_numpy(np.array(cache.pixels[row]))
            for region, box in enumerate(of_image.xyxy):
                mask = None if masks is None else masks[index][region]
                shown = pixels if mask is None else torch.where(_in_input(mask, cache.frames[row]), pixels, fill)
                longest = CROP_MARGIN * max(box[2] - box[0], box[3] - box[1])
                yield cut_square(shown, square_around(box, longest, size), side or spec.image_size)

    source, done = crops(), []
    total = sum(map(len, boxes))
    for _ in tqdm(range(0, total, batch_size), progress, unit="batch", disable=progress is None):
        batch = torch.stack(list(islice(source, batch_size))).to(device)
        pooled = tower(norm(batch)).pooler_output
        if pooled is None:
            raise UserError(f"crops are read by a tower's pooled output, and this {tower.config.model_type} has none.")
        done.append(pooled.float())
    features = torch.cat(done) if done else torch.empty(0, spec.hidden_size)
    yield from features.split([len(of_image) for of_image in boxes])


def _in_input(mask: Mask, frame: ImageFrame) -> Tensor:
    """A mask of the original image in the input frame, bool `(H, W)`: each pixel is what its middle falls on."""
    width, height = frame.input_size
    x = np.floor((np.arange(width) + 0.5 - frame.offset[0]) / frame.scale[0]).astype(int)
    y = np.floor((np.arange(height) + 0.5 - frame.offset[1]) / frame.scale[1]).astype(int)
    # A border of False takes everything outside of the image, the padding among it.
    inside = np.pad(mask.to_array(), 1)
    rows, columns = (np.clip(at + 1, 0, side - 1) for at, side in zip((y, x), inside.shape, strict=True))
    return torch.from_numpy(inside[np.ix_(rows, columns)])
