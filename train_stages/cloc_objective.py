"""CLOC pre-training: image-text and region-text contrast, and boxes found by their texts (arXiv 2410.02746, Sec. 3).

    L = L_CLIP + lambda (L_CLOC + L_grounding)                                                              (Eq. 4)
    L_CLOC       region-text InfoNCE over all regions of the global batch, texts that say the same left out (Eq. 2)
    L_grounding  = 1/(4 n) sum || l - Head(Prompter(f_T(y))) ||^2, corners l in 0..1 of the input           (Eq. 3)

lambda is the share of the images that have regions ("# of images containing region text" and "batch size" form a
fraction in the paper's Table A; which is on top cannot be read off it). The norm of Eq. 3 is squared here; its print
allows both.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..vision_towers import ClocModel
from ..vision_towers.errors import UserError
from ..vision_towers.prompter import in_unit_square
from ..vision_towers.region_boxes import valid_rows
from .contrastive import contrastive_loss
from .gather import world
from .normalise import PixelNorm
from .rice_objective import ObjectiveOutput


@dataclass(frozen=True)
class ClocLossConfig:
    """Weights and switches; the defaults are the paper's.

    region_weight: lambda's factor (1.0). grounding: whether L_grounding takes part. same_above: cosine of two region
    texts above which one is no negative of the other (0.9); None: never.
    """

    region_weight: float = 1.0
    grounding: bool = True
    same_above: float | None = 0.9

    def __post_init__(self) -> None:
        if self.region_weight < 0:
            raise UserError(f"region_weight is {self.region_weight}, it must be 0 or more")
        if self.same_above is not None and not -1 <= self.same_above <= 1:
            raise UserError(f"same_above is {self.same_above}, a cosine lies in [-1, 1]")


class ClocObjective(nn.Module):
    """A `ClocModel` and its losses. What processes have to share is exchanged: the losses are those of the global
    batch, and each process's gradient is the one that data parallelism has to average."""

    def __init__(self, model: ClocModel, config: ClocLossConfig):
        super().__init__()
        self.model = model
        self.settings = config  # Trainer writes into a model's `config`
        spec = model.vision_tower.spec
        self.norm = PixelNorm(spec.image_mean, spec.image_std)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        boxes: Tensor,
        region_counts: Tensor,
        region_input_ids: Tensor,
        region_attention_mask: Tensor,
    ) -> ObjectiveOutput:
        """pixel_values: (B, 3, S, S), uint8, or float already normalised; the rest as in `ClocModel.forward`."""
        group, settings = world(), self.settings
        found = self.model(
            self.norm(pixel_values),
            input_ids,
            attention_mask,
            boxes,
            region_counts,
            region_input_ids,
            region_attention_mask,
        )
        scale = self.model.logit_scale
        images = contrastive_loss(found.image_embeds, found.text_embeds, scale, group=group)
        regions = contrastive_loss(
            found.region_embeds, found.region_text_embeds, scale, same_above=settings.same_above, group=group
        )
        counts = torch.stack(
            [(region_counts > 0).sum(), region_counts.new_tensor(len(boxes)), region_counts.sum()]
        ).float()
        mine = counts[2]
        if group is not None:
            dist.all_reduce(counts, group=group)
        with_regions, batch, total = counts
        processes = 1 if group is None else group.size()
        input_hw = (pixel_values.shape[-2], pixel_values.shape[-1])
        truth = in_unit_square(boxes[valid_rows(region_counts, boxes.shape[1])], input_hw)
        guess = in_unit_square(found.text_boxes, input_hw)
        grounding = (guess - truth).square().sum() / (4 * total.clamp(min=1)) * processes
        if not settings.grounding:
            grounding = 0.0 * grounding
        weight = settings.region_weight * with_regions / batch
        loss = images.loss + weight * (regions.loss + grounding)
        metrics = {"image_to_text_top1": images.correct.float().mean()}
        if mine:
            metrics["region_to_text_top1"] = regions.correct.float().mean()
            metrics["text_box_error"] = (guess - truth).detach().abs().mean()
        return ObjectiveOutput(loss=loss, metrics=metrics)
