"""What a frozen tower makes of pictures, kept on the disk (`feature_rows`): filling it.

Alignment trains projectors on features that never change, and a tower is most of the work where the language model is
small.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..mllm.boxes import Boxes, Points
from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers import pad_boxes
from ..vision_towers.errors import UserError
from .chat_samples import NO_FRAME, Example
from .engine.storage import storage_errors
from .feature_rows import INDEX, Box, FeatureCache, FeatureKey, as_encoder_outputs, box_key, feature_key
from .images import ImageError
from .picture_file import PictureFile
from .waiting import wait_until_filled

__all__ = [
    "INDEX",
    "FeatureCache",
    "FeatureKey",
    "Wanted",
    "as_encoder_outputs",
    "blank_shape",
    "feature_key",
    "fill",
    "wait_until_filled",
    "wanted_pictures",
]

_BATCH = 16  # pictures through the tower at a time
Absent = tuple[str, tuple[PictureFile, dict[Box, torch.Tensor]]]  # a picture by its sha256, and its boxes


@dataclass(frozen=True)
class Wanted:
    """A picture, and the boxes on it that questions may name: float32 `(R, 4)` in input pixels."""

    picture: PictureFile
    boxes: list[torch.Tensor] = field(default_factory=list)


def wanted_pictures(examples: Iterable[Example], processor: RegionLlavaProcessor) -> Iterator[Wanted]:
    """Every picture with the boxes that a question about it may name."""
    for example in examples:
        if example.picture is None:
            continue
        boxes: list[torch.Tensor] = []
        if example.record is not None and processor.embeds_regions:
            record = example.record
            points = [Points([label.xy]).to_boxes().clip(record.width, record.height) for label in record.points]
            named = [*(region.box_xyxy for region in record.regions), *(box for some in points for box in some)]
            boxes = list(processor.to_input(Boxes(named), processor.frame((record.width, record.height))))
        yield Wanted(example.picture, boxes)


def fill(
    cache: FeatureCache,
    model: Any,
    processor: RegionLlavaProcessor,
    wanted: Iterable[Wanted],
    *,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> None:
    """Run the tower on every picture that is not kept yet; the size on the disk is said first.

    Pictures that cannot be read are left out: what asks for them finds them missing. What is kept survives an
    interruption, and the same call goes on from there.

    Raises:
        UserError: the disk has no room, or refuses a file.
    """
    cache.cut_half_line()
    absent = _absent(cache, wanted, say)
    tower = model.model.vision_tower
    # What is kept is what whole lines of the index name, so it stands whatever the disk refuses.
    with storage_errors(cache.folder, lambda: cache.folder), torch.no_grad(), _on(model.model, device):
        tower.eval()
        for start in tqdm(range(0, len(absent), _BATCH), desc="running the tower", unit="batch", disable=None):
            _add(cache, model, processor, absent[start : start + _BATCH], device)


def _absent(cache: FeatureCache, wanted: Iterable[Wanted], say: Callable[[str], None]) -> list[Absent]:
    """Pictures and boxes that are not kept; the room that they take is said, and must be there."""
    absent: dict[str, tuple[PictureFile, dict[Box, torch.Tensor]]] = {}
    looked = kept = 0
    for want in tqdm(wanted, desc="looking at pictures", unit="img", disable=None):
        try:
            image = want.picture.sha256()
        except ImageError:
            continue
        boxes = {box_key(box): box for box in want.boxes}
        looked += 1
        if (lacking := cache.lacks(image, boxes)) is None:
            kept += 1
            continue
        named = absent.setdefault(image, (want.picture, {}))[1]
        named |= {box: boxes[box] for box in lacking}
    regions = sum(len(named) for _, named in absent.values())
    size = cache.bytes_of(len(absent), regions)
    say(
        f"feature cache: {len(absent)} pictures x {cache.tokens} tokens x {cache.width} and {regions} boxes x "
        f"{cache.region_width} take {_size(size)} in {cache.folder} ({kept} of {looked} pictures are there already)"
    )
    _refuse_full_disk(cache.folder, size)
    return list(absent.items())


def _add(
    cache: FeatureCache, model: Any, processor: RegionLlavaProcessor, todo: list[Absent], device: torch.device
) -> None:
    names, pixels, boxes = [], [], []
    for image, (picture, named) in todo:
        try:
            opened = picture.open()
        except ImageError as error:
            tqdm.write(f"passed over: {error}")
            continue
        names.append(image)
        pixels.append(processor.pixels(opened))
        boxes.append(named)
    if not names:
        return
    inner = model.model
    asked = {}
    if any(boxes):
        padded, counts = pad_boxes(
            [torch.stack(list(named.values())) if named else torch.zeros(0, 4) for named in boxes]
        )
        asked = {"boxes": padded.to(device), "region_counts": counts.to(device)}
    weight = next(inner.vision_tower.parameters())
    values = processor.normalise(np.stack(pixels)).to(device, weight.dtype)
    with _inputs_of(inner.multi_modal_projector) as tokens, _inputs_of(inner.region_projector) as rows:
        inner.get_image_features(values, return_dict=True, **asked)
    found = rows[0].float() if rows else torch.zeros(0, cache.region_width)
    cache.add(names, tokens[0].float(), [list(named) for named in boxes], found)


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What a module is called with: exactly what it would get in training."""
    caught: list[torch.Tensor] = []

    def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        caught.append(arguments[0])

    handle = module.register_forward_pre_hook(note)
    try:
        yield caught
    finally:
        handle.remove()


@contextmanager
def _on(inner: Any, device: torch.device) -> Iterator[None]:
    """Tower and projectors on a device, and back where they were."""
    parts = (inner.vision_tower, inner.multi_modal_projector, inner.region_projector)
    before = [next(part.parameters()).device for part in parts]
    training = inner.vision_tower.training
    for part in parts:
        part.to(device)
    try:
        yield
    finally:
        inner.vision_tower.train(training)
        for part, place in zip(parts, before, strict=True):
            part.to(place)


def blank_shape(model: Any, processor: RegionLlavaProcessor) -> tuple[int, int]:
    """(tokens, width) of what the image projector takes of a picture."""
    side = processor.frame(NO_FRAME).input_size
    blank = torch.zeros(1, 3, side[1], side[0], dtype=next(model.model.vision_tower.parameters()).dtype)
    with torch.no_grad(), _inputs_of(model.model.multi_modal_projector) as tokens:
        model.model.get_image_features(blank.to(model.device), return_dict=True)
    return int(tokens[0].shape[1]), int(tokens[0].shape[2])


def _refuse_full_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"the feature cache needs {_size(size)} and {folder} has {_size(free)}; set data.cache_dir.")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
