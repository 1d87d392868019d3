"""RegionLlavaNext: LLaVA-NeXT whose text may hold `<region>` placeholders, each read from the view that shows it best.

The boxes of a picture lie in the frame of its views stacked from top to bottom (`tiles.stack_in_views`), so that one
tensor says both where a box is and in which view, from the processor through `generate` to the tower.
"""

from dataclasses import dataclass

import torch
from transformers import LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches
from transformers.utils.generic import can_return_tuple

from ..vision_towers import TowerFeatures, TowerOutput, UserError, describe_tower
from ..vision_towers.region_boxes import check_boxes
from .config import RegionLlavaNextConfig
from .projectors import RegionProjector
from .region_model import RegionGeneration, RegionModel
from .tiles import views_of_rows


class RegionLlavaNextModel(RegionModel, LlavaNextModel):
    """The vision tower, both projectors and the language model, without the head."""

    config: RegionLlavaNextConfig
    config_class = RegionLlavaNextConfig

    def __init__(self, config: RegionLlavaNextConfig):
        super().__init__(config)
        self.region_projector = RegionProjector(config)  # pyright: ignore[reportArgumentType] - the same fields
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        **kwargs,
    ) -> TowerOutput:
        """Run the tower once over all views, for image tokens and regions.

        Args:
            pixel_values: `(pictures, views, 3, side, side)`, zeros for views that a picture has not.
            image_sizes: `(pictures, 2)` height and width of the originals.
            boxes: `(pictures, R_max, 4)` float32 xyxy in pixels of a picture's views stacked top to bottom, padded.
            region_counts: `(pictures,)`.
        Returns:
            LLaVA-NeXT's own, with `region_embeds` the projected rows `(sum of region_counts, text width)` in the order
            of the boxes.
        """
        rows = None
        if boxes is not None:
            side = describe_tower(self.config.vision).image_size
            views = [self._view_count(size) for size in image_sizes.tolist()]
            rows = _RowsOfViews.spread(boxes, region_counts, views, side)
            kwargs |= {"boxes": rows.boxes, "region_counts": rows.counts}
        kwargs["return_dict"] = True
        output = super().get_image_features(
            pixel_values,
            image_sizes,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
        )
        features = TowerOutput(**output)  # pyright: ignore[reportCallIssue] - without boxes a tower returns what its native class does
        if rows is not None:
            features.region_embeds = self.region_projector(rows.gather(output.region_embeds))  # pyright: ignore
        return features

    def encode_more_regions(self, features: TowerFeatures, boxes: torch.Tensor) -> torch.Tensor:
        """Region rows for new boxes on one picture whose tower features are kept; the ViT does not run again.

        Args:
            features: of the picture's views, with the layers that the tower's `region_feature_layers` names.
            boxes: `(1, R, 4)` float32 in pixels of the views stacked from top to bottom, all rows real.
        Returns:
            `(R, text width)`.
        """
        views = len(next(iter(features.hidden.values())))
        rows = _RowsOfViews.spread(boxes, None, [views], features.input_hw[0])
        output = self.vision_tower(features=features, boxes=rows.boxes, region_counts=rows.counts)
        return self.region_projector(rows.gather(output.region_embeds))

    def blank_picture(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `RegionModel`."""
        side = describe_tower(self.config.vision).image_size
        height, width = min(self.config.image_grid_pinpoints or [], key=lambda point: point[0] * point[1])
        views = self._view_count([height, width])
        sizes = torch.tensor([[height, width]], device=like.device)
        return {"pixel_values": like.new_zeros(1, views, 3, side, side), "image_sizes": sizes}

    def _view_count(self, size: list[int]) -> int:
        """How many views a picture of `[height, width]` has."""
        side = describe_tower(self.config.vision).image_size
        return image_size_to_num_patches(size, self.config.image_grid_pinpoints, side)


@dataclass(frozen=True)
class _RowsOfViews:
    """Boxes of pictures as boxes of views, and the way back.

    Args:
        boxes: `(all views, most of a view, 4)` in pixels of the view. counts: `(all views,)`.
        view, slot: where each real box went, in the order of the pictures' boxes.
    """

    boxes: torch.Tensor
    counts: torch.Tensor
    view: torch.Tensor
    slot: torch.Tensor

    @classmethod
    def spread(
        cls, boxes: torch.Tensor, region_counts: torch.Tensor | None, views: list[int], side: int
    ) -> "_RowsOfViews":
        """Sort the real boxes of `(pictures, R_max, 4)` by view.

        Args:
            views: how many of them each picture has. side: pixels of a view.
        Raises:
            UserError: boxes of the wrong shape or in half precision, or below a picture's last view.
        """
        counts = check_boxes(boxes, region_counts, len(views))
        real = torch.arange(boxes.shape[1], device=boxes.device)[None] < counts[:, None]
        own = views_of_rows(boxes, side)
        number = torch.tensor(views, device=boxes.device)
        if bool((real & (own >= number[:, None])).any()):
            raise UserError("a box lies below its picture's last view; let RegionLlavaNextProcessor map the boxes.")
        first = number.cumsum(0) - number
        view = (first[:, None] + own)[real]
        inside = boxes[real] - own[real][:, None] * boxes.new_tensor([0.0, side, 0.0, side])
        chosen = view[:, None] == torch.arange(sum(views), device=boxes.device)[None]
        slot = (chosen.cumsum(0) - 1)[chosen]
        per_view = chosen.sum(0)
        padded = boxes.new_zeros(sum(views), max(1, int(per_view.max())), 4)
        padded[view, slot] = inside
        return cls(padded, per_view, view, slot)

    def gather(self, region_embeds: torch.Tensor) -> torch.Tensor:
        """`(all views, most of a view, D)` -> `(real boxes, D)`."""
        return region_embeds[self.view, self.slot]


class RegionLlavaNextForConditionalGeneration(RegionGeneration, LlavaNextForConditionalGeneration):
    """RegionLlavaNext with its language-model head; without regions equal to plain LLaVA-NeXT to the bit."""

    config: RegionLlavaNextConfig
    config_class = RegionLlavaNextConfig

    def __init__(self, config: RegionLlavaNextConfig):
        # Skips the plain class's __init__, which would build a plain inner model only to have it replaced.
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = RegionLlavaNextModel(config)
        text = config.text
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
