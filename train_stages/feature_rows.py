"""What a frozen tower made of pictures, as rows on the disk, and the key that says which tower it was.

Two files hold the rows one behind the other, as the projectors take them: image tokens of each picture, and one row for
each of its boxes. `index.jsonl` says whose they are, by the sha256 of the image file, and is written after them:
whatever a crash leaves half done is written again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers import TowerOutput
from .chat_samples import Encoded
from .images import ImageError
from .mllm_data import KeptFeatures, Sample
from .picture_file import PictureFile

INDEX, IMAGES, REGIONS = "index.jsonl", "images.bin", "regions.bin"
_ORIGIN = {"architectures", "dtype", "transformers_version"}
_FORMAT = 1  # part of the key: raise it when what is kept changes
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
        """The sample with what is kept of its picture. Raises ImageError for a picture that cannot be read, and for a
        picture or a box that is not kept."""
        if sample.picture is None:
            return Sample(sample.ids, sample.labels, None, sample.boxes)
        try:
            image = sample.picture.sha256()
        except ImageError as error:
            raise _unreadable(sample.picture, error) from None
        boxes = [box_key(box) for box in sample.boxes]
        if self.lacks(image, boxes) is not None:
            self.read_index()  # the first process may have kept it since
        if self.lacks(image, boxes) is not None:
            try:
                sample.picture.open()
            except ImageError as error:  # `fill` passed it over
                raise _unreadable(sample.picture, error) from None
            raise ImageError(f"{sample.picture.name}: it is not in the feature cache {self.folder}; delete the folder.")
        tokens = self._rows(IMAGES, self._images[image] * self.tokens, self.tokens, self.width)
        rows = [self._rows(REGIONS, self._regions[image, box], 1, self.region_width) for box in boxes]
        regions = torch.cat(rows) if rows else torch.zeros(0, self.region_width, dtype=self._dtype)
        return Sample(sample.ids, sample.labels, None, sample.boxes, KeptFeatures(tokens, regions))

    def batch(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """For a collate function: `kept_images` `(pictures, tokens, width)` and `kept_regions` `(boxes, region_width)`
        of the samples that have a picture, in the dtype that rows are kept in."""
        kept = [sample.kept for sample in samples if sample.kept is not None]
        images = [one.image for one in kept] or [torch.zeros(0, self.tokens, self.width, dtype=self._dtype)]
        regions = [one.regions for one in kept] or [torch.zeros(0, self.region_width, dtype=self._dtype)]
        return {"kept_images": torch.stack(images) if kept else images[0], "kept_regions": torch.cat(regions)}


def as_encoder_outputs(batch: dict[str, Any], progress: float = 0.0) -> dict[str, Any]:
    """A batch of `FeatureCache.batch` as RegionLlava takes it: the projectors are run on it, the tower is not.

    Args:
        batch: holds `kept_images` `(pictures, tokens, width)` and `kept_regions` `(boxes, region_width)`; either may
            have no rows.
        progress: is not looked at; `run_stage` gives it.
    Returns:
        The batch without these two. `mm_encoder_outputs["image"]` is a `TowerOutput` of the same tensors:
        `last_hidden_state` `(pictures, tokens, width)`, `region_embeds` `(boxes, region_width)`.
    """
    rest = dict(batch)
    kept = TowerOutput(last_hidden_state=rest.pop("kept_images"), region_embeds=rest.pop("kept_regions"))
    return rest | {"mm_encoder_outputs": {"image": kept}}


def box_key(box: torch.Tensor) -> Box:
    """Of one box, float32 `(4,)`."""
    return box.numpy().astype("<f4").tobytes()


def _unreadable(picture: PictureFile, error: ImageError) -> ImageError:
    reason = str(error).removeprefix(f"{picture.name}: ").rstrip(".")
    return ImageError(f"{picture.path or picture.name}: no features are kept of it, it cannot be read ({reason}).")
