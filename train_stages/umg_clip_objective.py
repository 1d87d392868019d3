"""UMG-CLIP pre-training: captions and tags matched with images, regions and masks (arXiv 2401.06397).

    L = w_ic L_IT + w_it L_Itag + w_rc L_RT + w_rt L_Rtag + w_pc L_PT + w_pt L_Ptag

    L_IT, L_RT, L_PT         symmetric InfoNCE of images with captions, and of boxes and masks with texts of regions
    L_Itag, L_Rtag, L_Ptag   sigmoid over sampled tags (`tag_loss`)

The paper states that captions and tags are matched at the level of the image, of the region and of the pixel. That is
all of its objective that is known to us: formulas, weights and negatives here are our completion, from its relatives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..vision_towers import UmgClipModel
from ..vision_towers.errors import UserError
from ..vision_towers.region_boxes import valid_rows
from .contrastive import contrastive_loss
from .gather import world
from .normalise import PixelNorm
from .rice_objective import ObjectiveOutput
from .tag_loss import sampled_tags, tag_loss, tags_in_sample

WEIGHTS = ("image_caption", "image_tag", "region_caption", "region_tag", "pixel_caption", "pixel_tag")


@dataclass(frozen=True)
class UmgClipLossConfig:
    """Weights of the six losses, and which texts and tags stand against each other. None of them is in the paper.

    image_caption: w_ic. image_tag: w_it (0.25). region_caption: w_rc (0.1, FG-CLIP's weight of its region-text loss).
    region_tag: w_rt. pixel_caption: w_pc. pixel_tag: w_pt (as the region's). A loss with weight 0 does not count.
    same_above: cosine of two texts above which one is no negative of the other, in all three losses of captions (0.95,
    FG-CLIP 2); None: never. tag_negatives: how many tags are drawn against those that are present (100, CLIPSelf's code
    takes so many classes in all).
    """

    image_caption: float = 1.0
    image_tag: float = 0.25
    region_caption: float = 0.1
    region_tag: float = 0.1
    pixel_caption: float = 0.1
    pixel_tag: float = 0.1
    same_above: float | None = 0.95
    tag_negatives: int = 100

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in WEIGHTS}
        for name, weight in weights.items():
            if weight < 0:
                raise UserError(f"{name} is {weight}, it must be 0 or more")
        if not any(weights.values()):
            raise UserError("every weight of the loss is 0; one at least must not be")
        if self.same_above is not None and not -1 <= self.same_above <= 1:
            raise UserError(f"same_above is {self.same_above}, a cosine lies in [-1, 1]")
        if self.tag_negatives < 0:
            raise UserError(f"tag_negatives is {self.tag_negatives}, it must be 0 or more")


class UmgClipObjective(nn.Module):
    """A `UmgClipModel` and its losses. What processes have to share is exchanged: the losses are those of the global
    batch, and each process's gradient is the one that data parallelism has to average.

    tag_input_ids, tag_attention_mask: `(N, T)`, the texts of all N tags, padded on the right; N may be 0. A step
    encodes those it has sampled, each once.
    """

    def __init__(
        self, model: UmgClipModel, tag_input_ids: Tensor, tag_attention_mask: Tensor, config: UmgClipLossConfig
    ):
        super().__init__()
        self.model = model
        self.settings = config  # Trainer writes into a model's `config`
        spec = model.vision_tower.spec
        self.norm = PixelNorm(spec.image_mean, spec.image_std)
        self.tag_input_ids = nn.Buffer(tag_input_ids, persistent=False)
        self.tag_attention_mask = nn.Buffer(tag_attention_mask, persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        captioned: Tensor,
        image_tags: Tensor,
        boxes: Tensor,
        masks: Tensor,
        region_counts: Tensor,
        region_input_ids: Tensor,
        region_attention_mask: Tensor,
        region_tags: Tensor,
        tag_seed: Tensor,
    ) -> ObjectiveOutput:
        """The weighted loss of a batch.

        pixel_values: (B, 3, S, S), uint8, or float already normalised. captioned: (B,) bool, the images that the
        captions, input_ids and attention_mask (n, T), are of, in order. boxes: (B, R, 4) float32 xyxy in pixels of the
        input. masks: (B, R, rows, columns), the share of each patch that a region covers; a region without a mask has
        0 everywhere. region_counts: (B,). region_input_ids, region_attention_mask: (m, T), a text of each real region,
        image by image. image_tags: (B, K), region_tags: (B, R, K) int64, rows of the tag texts, padded with -1.
        tag_seed: scalar int64, see `sampled_tags`.
        """
        group, settings, bank = world(), self.settings, len(self.tag_input_ids)
        both = torch.cat([image_tags.flatten(), region_tags.flatten()])
        sample = sampled_tags(both, bank, settings.tag_negatives, tag_seed, group)
        found = self.model(
            self.norm(pixel_values),
            input_ids,
            attention_mask,
            boxes,
            masks,
            region_counts,
            region_input_ids,
            region_attention_mask,
            self.tag_input_ids[sample],
            self.tag_attention_mask[sample],
        )
        valid = valid_rows(region_counts, boxes.shape[1])
        has_mask, texts = (masks > 0).any((2, 3))[valid], found.region_text_embeds
        of_regions = self.model.region_logit_scale
        captions = {
            "image": (found.image_embeds[captioned], found.text_embeds, self.model.logit_scale),
            "region": (found.region_embeds, texts, of_regions),
            "pixel": (found.mask_embeds[has_mask], texts[has_mask], of_regions),
        }
        image_own = tags_in_sample(image_tags, sample, bank)
        region_own = tags_in_sample(region_tags[valid], sample, bank)
        tags = {
            "image": (found.image_embeds, image_own),
            "region": (found.region_embeds, region_own),
            "pixel": (found.mask_embeds[has_mask], region_own[has_mask]),
        }
        loss, metrics = pixel_values.new_zeros((), dtype=torch.float32), {}
        for level, (seen, said, scale) in captions.items():
            part = contrastive_loss(seen, said, scale, same_above=settings.same_above, group=group)
            loss = loss + getattr(settings, f"{level}_caption") * part.loss
            if len(seen):
                metrics[f"{level}_to_text_top1"] = part.correct.float().mean()
        scale, bias = self.model.tag_logit_scale, self.model.tag_logit_bias
        for level, (seen, own) in tags.items():
            part = tag_loss(seen, found.tag_embeds, own, scale, bias, group)
            loss = loss + getattr(settings, f"{level}_tag") * part.loss
            if len(part.correct):
                metrics[f"{level}_tag_top1"] = part.correct.float().mean()
        return ObjectiveOutput(loss=loss, metrics=metrics)
