"""What a frozen tower makes of pictures, kept on the disk.

Alignment trains projectors on features that never change, and a tower is most of the work where the language model is
small. Two files hold the rows one behind the other, as the projectors take them: image tokens of each picture, and one
row for each of its boxes. `index.jsonl` says whose they are, by the sha256 of the image file, and is written after
them: whatever a crash leaves half done is written again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..mllm.boxes import Boxes, Points
from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers import TowerOutput, pad_boxes
from ..vision_towers.errors import UserError
from .chat_samples import NO_FRAME, Encoded, Example
from .images import ImageError
from .mllm_data import KeptFeatures, Sample
from .picture_file import PictureFile

INDEX, IMAGES, REGIONS = "index.jsonl", "images.bin", "regions.bin"
_ORIGIN = {"architectures", "dtype", "transformers_version"}
_FORMAT = 1  # part of the key: raise it when what is kept changes
_BATCH = 16  # pictures through the tower at a time
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Box = bytes  # of its four float32 in input pixels


@dataclass(frozen=True)
class FeatureKey:
    """What features depend on, besides the picture."""

    tower: str  # sha256 of its weights
    config: str  # of the tower: the same weights can be read in other ways
    layer: Any
    strategy: str
    processor: str
    dtype: str
    computed_in: str
    format: int = _FORMAT

    def folder(self, inside: Path) -> Path:
        """One for each key."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return inside / f"features-{digest[:16]}"


def feature_key(model: Any, processor: RegionLlavaProcessor, dtype: str, precision: str) -> FeatureKey:
    """The key of a RegionLlava's tower. dtype: that rows are kept in, "bf16" or "fp32". precision: that the tower
    computes in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    normalisation = processor.image_processor.to_dict()
    known = {"side": processor.image_size, "fill": processor.fill_colour, "normalisation": normalisation}
    config = model.config
    return FeatureKey(
        digest.hexdigest(),
        _settings(config.vision_config),
        config.vision_feature_layer,
        config.vision_feature_select_strategy,
        json.dumps(known, sort_keys=True, default=str),
        dtype,
        precision,
    )


def _settings(tower: Any) -> str:
    """What a tower's configuration says of its computing: not where it comes from."""
    found = {key: value for key, value in tower.to_dict().items() if key not in _ORIGIN and not key.startswith("_")}
    return json.dumps(found, sort_keys=True, default=str)


@dataclass(frozen=True)
class Wanted:
    """A picture, and the boxes on it that questions may name: float32 `(R, 4)` in input pixels."""

    picture: PictureFile
    boxes: list[torch.Tensor] = field(default_factory=list)


class FeatureCache:
    """The kept rows in one folder.

    tokens, width: of a picture. region_width: of a box's row.
    """

    def __init__(self, folder: Path, dtype: str, tokens: int, width: int, region_width: int) -> None:
        self.folder, self._dtype = folder, _DTYPES[dtype]
        self.tokens, self.width, self.region_width = tokens, width, region_width
        self._images: dict[str, int] = {}
        self._regions: dict[tuple[str, Box], int] = {}
        self.image_rows = self.region_rows = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.read_index()

    def read_index(self) -> int:
        """Take over what the index names; another process may have written to it. Returns the bytes of whole lines."""
        index = self.folder / INDEX
        lines = index.read_bytes().splitlines(keepends=True) if index.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last one is half there if it is being written
        for line in whole:
            self._note(json.loads(line))
        return sum(map(len, whole))

    def cut_half_line(self) -> None:
        """Remove what a process left that was killed while it wrote. For the process that fills the cache."""
        whole, index = self.read_index(), self.folder / INDEX
        if index.is_file() and index.stat().st_size > whole:
            with index.open("r+b") as file:
                file.truncate(whole)

    def _note(self, entry: dict[str, Any]) -> None:
        self._images[entry["image"]] = entry["row"]
        self.image_rows = max(self.image_rows, entry["row"] + 1)
        for number, box in enumerate(entry["boxes"]):
            self._regions[entry["image"], bytes.fromhex(box)] = entry["region_row"] + number
        self.region_rows = max(self.region_rows, entry["region_row"] + len(entry["boxes"]))

    def bytes_of(self, images: int, regions: int) -> int:
        """Size of so many more rows."""
        return (images * self.tokens * self.width + regions * self.region_width) * self._dtype.itemsize

    def lacks(self, image: str, boxes: Iterable[Box]) -> list[Box] | None:
        """The boxes of a picture that are not kept; None when the picture and all its boxes are."""
        absent = [box for box in boxes if (image, box) not in self._regions]
        return absent if absent or image not in self._images else None

    def add(
        self, images: Sequence[str], tokens: torch.Tensor, boxes: Sequence[Sequence[Box]], rows: torch.Tensor
    ) -> None:
        """Keep a batch: `tokens` `(B, tokens, width)`, `rows` `(all boxes, region_width)`, picture by picture."""
        self._write(IMAGES, self.image_rows * self.tokens, tokens.flatten(0, 1))
        self._write(REGIONS, self.region_rows, rows)
        entries, row, region_row = [], self.image_rows, self.region_rows
        for image, named in zip(images, boxes, strict=True):
            hexed = [box.hex() for box in named]
            entries.append({"image": image, "row": row, "region_row": region_row, "boxes": hexed})
            row, region_row = row + 1, region_row + len(named)
        with (self.folder / INDEX).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        for entry in entries:
            self._note(entry)

    def _write(self, name: str, row: int, values: torch.Tensor) -> None:
        path = self.folder / name
        path.touch()
        if len(values):
            with path.open("r+b") as file:
                file.seek(row * values.shape[1] * self._dtype.itemsize)
                file.write(values.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().tobytes())

    def _rows(self, name: str, first: int, count: int, width: int) -> torch.Tensor:
        size = width * self._dtype.itemsize
        with (self.folder / name).open("rb") as file:
            file.seek(first * size)
            data = bytearray(file.read(count * size))
        return torch.frombuffer(data, dtype=self._dtype).view(count, width)

    def __call__(self, sample: Encoded) -> Sample:
        """The sample with what is kept of its picture. Raises ImageError for a picture, or a box, that is not kept."""
        if sample.picture is None:
            return Sample(sample.ids, sample.labels, None, sample.boxes)
        image = sample.picture.sha256()
        boxes = [box_key(box) for box in sample.boxes]
        if self.lacks(image, boxes) is not None:
            self.read_index()  # the first process may have kept it since
        if self.lacks(image, boxes) is not None:
            raise ImageError(f"{sample.picture.name}: it is not in the feature cache {self.folder}; delete the folder.")
        tokens = self._rows(IMAGES, self._images[image] * self.tokens, self.tokens, self.width)
        rows = [self._rows(REGIONS, self._regions[image, box], 1, self.region_width) for box in boxes]
        regions = torch.cat(rows) if rows else torch.zeros(0, self.region_width, dtype=self._dtype)
        return Sample(sample.ids, sample.labels, None, sample.boxes, KeptFeatures(tokens, regions))

    def batch(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """For a collate function: `kept_images` `(pictures, tokens, width)`, `kept_regions` `(boxes, region_width)`."""
        kept = [sample.kept for sample in samples if sample.kept is not None]
        images = [one.image for one in kept] or [torch.zeros(0, self.tokens, self.width, dtype=self._dtype)]
        regions = [one.regions for one in kept] or [torch.zeros(0, self.region_width, dtype=self._dtype)]
        return {"kept_images": torch.stack(images) if kept else images[0], "kept_regions": torch.cat(regions)}


def as_encoder_outputs(batch: dict[str, Any], progress: float = 0.0) -> dict[str, Any]:
    """A batch of `FeatureCache.batch` as RegionLlava takes it: in `mm_encoder_outputs`, the projectors to be run."""
    rest = dict(batch)
    kept = TowerOutput(last_hidden_state=rest.pop("kept_images"), region_embeds=rest.pop("kept_regions"))
    return rest | {"mm_encoder_outputs": {"image": kept}}


def box_key(box: torch.Tensor) -> Box:
    """Of one box, float32 `(4,)`."""
    return box.numpy().astype("<f4").tobytes()


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
        UserError: the disk has no room.
    """
    cache.cut_half_line()
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
    todo = list(absent.items())
    tower = model.model.vision_tower
    with torch.no_grad(), _on(model.model, device):
        tower.eval()
        for start in tqdm(range(0, len(todo), _BATCH), desc="running the tower", unit="batch", disable=None):
            _add(cache, model, processor, todo[start : start + _BATCH], device)


def _add(
    cache: FeatureCache, model: Any, processor: RegionLlavaProcessor, todo: list[Any], device: torch.device
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
