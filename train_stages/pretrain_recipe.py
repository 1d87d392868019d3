"""The recipe of `pretrain`: typed blocks, each with its defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from .augment import AugmentConfig
from .clip_objective import ClipConfig
from .cloc_objective import ClocLossConfig
from .pretrain_data import CaptionSource
from .record_source import WEBDATASET, RecordSource
from .region_labels import ObjectLabels
from .rice_objective import RiceConfig
from .train_config import TrainConfig
from .umg_clip_objective import UmgClipLossConfig

_STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=_STRICT)
class TowerSize:
    """A new RICE tower; the defaults are `nano`. `hidden_size / heads` must be a multiple of 4 (axial rotary code), and
    `image_size` one of `patch_size`.

    num_region_layers and region_mask_rule: see `RiceVisionConfig`.
    """

    hidden_size: Count = 192
    layers: Count = 6
    heads: Count = 6
    intermediate_size: Count = 768
    patch_size: Count = 14
    image_size: Count = 112
    num_region_layers: Count = 2
    region_mask_rule: Literal["centre", "overlap"] = "centre"

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 x heads = {4 * self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")


@dataclass(frozen=True, config=_STRICT)
class ClocSettings:
    """What the cloc objective adds to a native ViT.

    text: the text tower and the joint space, as for the clip objective. prompter_heads, prompter_pool, add_token_pos,
    region_pool: see `ClocVisionConfig`. loss: see `ClocLossConfig`.
    """

    text: ClipConfig = Field(default_factory=ClipConfig)
    prompter_heads: Count = 1
    prompter_pool: Literal["image", "prompt", "all"] = "image"
    add_token_pos: bool | None = None
    region_pool: Literal["prompter", "roi_align"] = "prompter"
    loss: ClocLossConfig = Field(default_factory=ClocLossConfig)


@dataclass(frozen=True, config=_STRICT)
class UmgClipSettings:
    """What the umg_clip objective adds to a native ViT.

    text: a new text tower and the joint space, as for the clip objective. pooling: how dense features are made, see
    `UmgClipVisionConfig`; by the tower's kind when absent. reduce_after, reduce_to: tokens merged into clusters, see
    there too. loss: see `UmgClipLossConfig`.
    """

    text: ClipConfig = Field(default_factory=ClipConfig)
    pooling: Literal["value", "map"] | None = None
    reduce_after: Count | None = None
    reduce_to: float = 0.5
    loss: UmgClipLossConfig = Field(default_factory=UmgClipLossConfig)


@dataclass(frozen=True, config=_STRICT)
class PretrainModel:
    """What is trained. objective: "rice", "clip", "cloc" or "umg_clip" (read with the block of that name). tower: a
    checkpoint to start from, opened by `load_tower`; without it a new tower of `size`. keep_heads: go on with the class
    centres, or the text tower and projections, of the finished run that `tower` names, instead of new ones: with the
    same tokenizer and, for clip and cloc, the same settings. For umg_clip, `tower` may also name a native CLIP or
    SigLIP, whose tokenizer is data.tokenizer."""

    objective: Literal["rice", "clip", "cloc", "umg_clip"] = "rice"
    tower: str | None = None
    keep_heads: bool = False
    size: TowerSize = Field(default_factory=TowerSize)
    rice: RiceConfig = Field(default_factory=RiceConfig)
    clip: ClipConfig = Field(default_factory=ClipConfig)
    cloc: ClocSettings = Field(default_factory=ClocSettings)
    umg_clip: UmgClipSettings = Field(default_factory=UmgClipSettings)


@dataclass(frozen=True, config=_STRICT)
class PretrainData(RecordSource):
    """What is trained on.

    records, root, format: see `RecordSource`. tokenizer: folder of a transformers tokenizer; without it OCR regions are
    left out (the other objectives cannot do without). side: pixels of the letterboxed square, the tower's own when
    absent. stream: read records and images as they come instead of decoding all of them first; `records` are then best
    many files. shuffle_buffer: how many records a streamed one is drawn from. view: pixels of the random views that the
    tower gets; `side` when absent. Either is a size that the tower takes. view_schedule: (share, pixels), ascending:
    until that share of the run, views are shrunk to so many pixels. regions_per_image: N (cloc, as M, and umg_clip: at
    most). object_labels: "category", "tags" (tags and category) or "cluster". captions (clip): see `CaptionItems`.
    stuff: whether stuff regions take part. cache_dir: where decoded pixels are kept; inside the run when absent.
    augment: see `AugmentConfig`.
    """

    tokenizer: str | None = None
    side: Count | None = None
    stream: bool = False
    shuffle_buffer: Count = 1000
    view: Count | None = None
    view_schedule: tuple[tuple[float, Count], ...] = ()
    regions_per_image: Count = 10
    object_labels: ObjectLabels = "category"
    captions: CaptionSource = "image"
    stuff: bool = True
    cache_dir: str | None = None
    augment: AugmentConfig = Field(default_factory=AugmentConfig)


@dataclass(frozen=True, config=_STRICT)
class PretrainEval:
    """Held-out records that the run is measured on, at its end and during it.

    records: as in `data`; nothing is measured without. every: steps from one measurement to the next; the end alone
    when absent. batch_size: images that the loss contrasts, those of all processes together.

    Raises ValueError for a format that can only be streamed.
    """

    records: str | tuple[str, ...] | None = None
    root: str | None = None
    format: str = "records"
    every: Count | None = None
    batch_size: Count = 64

    def __post_init__(self) -> None:
        if self.format == WEBDATASET:
            raise ValueError(
                f"records are read at once, and {WEBDATASET} shards can only be streamed; give files of region "
                "records, or of another format"
            )


@dataclass(frozen=True, config=_STRICT)
class PretrainLr:
    """Peak learning rates. heads: class centres, or text tower, projections and whatever else is beside the ViT."""

    tower: Annotated[float, Field(ge=0)] = 1e-3
    heads: Annotated[float, Field(ge=0)] = 1e-3


@dataclass(frozen=True, config=_STRICT)
class PretrainRecipe:
    """The recipe of `pretrain`."""

    data: PretrainData
    train: TrainConfig
    model: PretrainModel = Field(default_factory=PretrainModel)
    eval: PretrainEval = Field(default_factory=PretrainEval)
    lr: PretrainLr = Field(default_factory=PretrainLr)
