"""A frozen tower with its adapters and a head: pixels and the texts of any classes to segments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...mllm.boxes import ImageFrame
from ...train_stages.normalise import PixelNorm
from ...vision_towers import UserError
from .label_maps import PanopticMap
from .merging import merged
from .panoptic_head import HEADS, PanopticHead, Proposals
from .semantic_head import SemanticHead
from .text_space import TextSpace
from .tuning import TUNINGS, Tuning, tune

Task = Literal["semantic", "panoptic"]
TASKS: tuple[str, ...] = get_args(Task)
CELLS = 16_000_000  # logits of pixels that are held at once


@dataclass(frozen=True)
class SegmenterConfig:
    """None of it is in the paper.

    task: "semantic" or "panoptic". tuning, lora_rank, bottleneck: as in `tune`. width: channels of the decoder.
    queries: masks that are proposed, at least as many as an image has segments. min_score, min_overlap: of proposals
    (`merged`); MaskFormer takes 0.8 and 0.8.
    """

    task: Task
    tuning: Tuning = "none"
    width: int = 128
    queries: int = 50
    lora_rank: int = 16
    bottleneck: int = 8
    min_score: float = 0.5
    min_overlap: float = 0.8

    def __post_init__(self) -> None:
        for name, value, choices in (("task", self.task, TASKS), ("tuning", self.tuning, TUNINGS)):
            if value not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        if self.width < HEADS or self.width % HEADS:
            raise UserError(f"width is {self.width}; the decoder needs a multiple of {HEADS}.")
        if min(self.queries, self.lora_rank, self.bottleneck) < 1:
            raise UserError("queries, lora_rank and bottleneck must be at least 1.")


class Segmenter(nn.Module):
    """`space`'s tower, tuned in place as `config` says, and a new head. frozen: `fingerprint` of the tower before.

    Raises:
        UserError: a tower that has adapters already, or none that they fit.
    """

    def __init__(self, space: TextSpace, config: SegmenterConfig):
        super().__init__()
        self.config, self._space = config, space
        self.tower, self.frozen = space.tower, fingerprint(space.tower)
        tune(space.tower, config.tuning, config.lora_rank, config.bottleneck)
        spec, joint = space.tower.spec, space.joint_dim
        sizes = spec.hidden_size, joint, config.width
        self.head = SemanticHead(*sizes) if config.task == "semantic" else PanopticHead(*sizes, config.queries)
        self.norm = PixelNorm(spec.image_mean, spec.image_std)
        self.to(space.tower.device)

    def forward(self, pixels: Tensor, texts: Tensor) -> Any:
        """What the head answers for uint8 pixels `(B, 3, H, W)` and texts `(C, J)` of length 1: logits
        `(B, C, rows, columns)`, or `Proposals`."""
        pixels = self.norm(pixels.to(self.norm.shift.device))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.tuning != "none"):
            dense = self.tower(pixels, output_dense_features=True).dense_features
            embeds = self._space.project(dense)
        return self.head(dense.permute(0, 3, 1, 2), embeds.permute(0, 3, 1, 2), pixels, texts)

    @torch.no_grad()
    def segments(self, pixels: np.ndarray, frame: ImageFrame, texts: Tensor, stuff: Sequence[bool]) -> PanopticMap:
        """The segments of one image, in pixels of the original. A semantic head gives one for each class that it finds.

        Args:
            pixels: uint8 `(3, side, side)`, the view. frame: original -> view. texts: `(C, J)` of length 1, one for
                each class. stuff: `(C,)`, of which classes segments are merged (panoptic).
        """
        found = self(torch.from_numpy(np.array(pixels))[None], texts)
        if isinstance(found, Proposals):
            limits = self.config.min_score, self.config.min_overlap
            every = slice(0, frame.original_size[1])
            return merged(
                found.masks[0], found.classes[0], stuff, *limits, lambda masks: at_pixels(masks, frame, every)
            )
        width, height = frame.original_size
        step = max(1, CELLS // (width * len(texts)))
        bands = [slice(start, min(start + step, height)) for start in range(0, height, step)]
        best = torch.cat([at_pixels(found[0], frame, rows).argmax(0) for rows in bands]).cpu().numpy()
        classes, segment = np.unique(best, return_inverse=True)
        return PanopticMap(segment.reshape(best.shape), tuple(classes.tolist()), (False,) * len(classes))

    def learned(self) -> dict[str, Tensor]:
        """What training changes: head and adapters, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


def at_pixels(grid: Tensor, frame: ImageFrame, rows: slice) -> Tensor:
    """A grid `(K, rows, columns)` over a view, interpolated at the centres of the original's pixels: `(K, n, width)`
    for n rows of pixels."""
    places = []
    for axis, (start, stop) in enumerate(((0, frame.original_size[0]), (rows.start, rows.stop))):
        centres = torch.arange(start, stop, device=grid.device) + 0.5
        inside = (centres * frame.scale[axis] + frame.offset[axis]) / frame.input_size[axis]
        places.append(2 * inside - 1)
    y, x = torch.meshgrid(places[1], places[0], indexing="ij")
    where = torch.stack([x, y], dim=-1)[None].to(grid.dtype)
    return F.grid_sample(grid[None], where, mode="bilinear", padding_mode="border", align_corners=False)[0]


def save_segmenter(segmenter: Segmenter, path: str | Path) -> None:
    """What has been learned, in one safetensors file; the tower and its texts are not in it."""
    state = {name: value.detach().cpu().contiguous() for name, value in segmenter.learned().items()}
    save_file(state, path, {"segmenter": json.dumps(asdict(segmenter.config)), "tower": segmenter.frozen})


def fingerprint(tower: nn.Module) -> str:
    """sha256 (hex) over the names and values of the tower's weights, in float32."""
    digest = hashlib.sha256()
    for name, value in tower.state_dict().items():
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_segmenter(space: TextSpace, path: str | Path) -> Segmenter:
    """A segmenter on `space`, of the tower it was trained on, that knows what the file of `save_segmenter` says.

    Raises:
        UserError: no such file, or one of something else or of another tower.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; it should be one of save_segmenter.")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}.") from error
    if "segmenter" not in about:
        raise UserError(f"{path} holds no segmenter.")
    if fingerprint(space.tower) != about.get("tower"):
        raise UserError(f"the segmenter in {path} is that of another tower.")
    segmenter = Segmenter(space, SegmenterConfig(**json.loads(about["segmenter"])))
    wanted = segmenter.learned()
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(saved[name])
    return segmenter.eval()
