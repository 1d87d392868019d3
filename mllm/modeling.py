"""RegionLlava: LLaVA whose text may hold `<region>` placeholders, filled with projected region embeddings.

How regions travel through `generate` of transformers 5.23: it calls `get_image_features` before the first step, pops
every argument that method names, expands what came back for beams, and hands it to `forward` as `mm_encoder_outputs`
at prefill only. Region embeddings are their own entry there, `mm_encoder_outputs["region"]`: rows of all texts, flat,
in the order of the placeholders. Inside the image entry they would be cut wrongly by chunked prefill.
"""

from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast, LlavaMultiModalProjector
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from ..vision_towers import TowerFeatures, TowerOutput, UserError, describe_tower
from .config import RegionLlavaConfig
from .projectors import ImageProjector, RegionProjector


class RegionLlavaModel(LlavaModel):
    """The vision tower, both projectors and the language model, without the head."""

    config: RegionLlavaConfig
    config_class = RegionLlavaConfig

    def __init__(self, config: RegionLlavaConfig):
        super().__init__(config)
        if not config.plain_exportable:
            self.multi_modal_projector = ImageProjector(config)
        self.region_projector = RegionProjector(config)
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    @select_hidden_states("vision_feature_layer")
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        **kwargs,
    ) -> TowerOutput:
        """Run the tower once, for image tokens and regions.

        Args:
            pixel_values: `(images, 3, H, W)`, one size a batch.
            boxes: `(images, R_max, 4)` float32 xyxy in pixels of that `(H, W)` frame, padded.
            region_counts: `(images,)`.
        Returns:
            The tower's output with `pooler_output` replaced by a list of `(image tokens, text width)`, one an image
            (as LLaVA does), and `region_embeds` by the projected rows `(sum of region_counts, text width)`.
        """
        if boxes is not None:
            kwargs |= {"boxes": boxes, "region_counts": region_counts}
        output = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        assert vision_feature_layer is not None  # filled in from the config
        layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
        selected = torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)
        if vision_feature_select_strategy == "default":
            selected = selected[:, 1:]
        input_hw = (pixel_values.shape[-2], pixel_values.shape[-1])
        features = TowerOutput(
            last_hidden_state=output.last_hidden_state,
            pooler_output=list(self.project_image(selected, input_hw)),  # pyright: ignore[reportArgumentType]
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        if boxes is not None:
            features.region_embeds = self.project_regions(output.region_embeds, region_counts)
        return features

    def project_image(self, tokens: torch.Tensor, input_hw: tuple[int, int]) -> torch.Tensor:
        """Patch tokens `(B, patches, D)` of inputs of `input_hw` pixels to `(B, image tokens, text width)`."""
        if isinstance(self.multi_modal_projector, LlavaMultiModalProjector):
            return self.multi_modal_projector(tokens)
        return self.multi_modal_projector(tokens, describe_tower(self.config.vision).grid(*input_hw))

    def project_regions(self, region_embeds: torch.Tensor, region_counts: torch.Tensor | None) -> torch.Tensor:
        """Padded tower rows `(B, R_max, region_dim)` to flat projected rows `(sum of counts, text width)`."""
        rows = region_embeds.shape[1]
        if region_counts is None:
            flat = region_embeds.flatten(0, 1)
        else:
            real = (
                torch.arange(rows, device=region_embeds.device)[None] < region_counts.to(region_embeds.device)[:, None]
            )
            flat = region_embeds[real]
        return self.region_projector(flat)

    def encode_more_regions(self, features: TowerFeatures, boxes: torch.Tensor) -> torch.Tensor:
        """Region rows for new boxes on images whose tower features are kept; the ViT does not run again.

        Args:
            features: with the layers that the tower's `region_feature_layers` names.
            boxes: `(B, R, 4)` float32, all rows real.
        Returns:
            `(B * R, text width)`.
        """
        return self.project_regions(self.vision_tower(features=features, boxes=boxes).region_embeds, None)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """As `LlavaModel.forward`, with `boxes` and `region_counts` as in `get_image_features`.

        Raises:
            UserError: placeholders in the text and what should fill them differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds.")
        if pixel_values is not None and mm_encoder_outputs:
            raise UserError("give either pixel_values or mm_encoder_outputs.")
        if boxes is not None and pixel_values is None:
            raise UserError("boxes need the pixel_values they lie on.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        assert inputs_embeds is not None

        encoded = dict(mm_encoder_outputs or {})
        idle: torch.Tensor | float = 0.0
        if pixel_values is not None:
            encode_boxes, encode_counts, dummy_region = boxes, region_counts, False
            if self.training and not _any_region(boxes, region_counts):
                encode_boxes, encode_counts = _whole_image_box(pixel_values)
                dummy_region = True
            image = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                boxes=encode_boxes,
                region_counts=encode_counts,
                return_dict=True,
            )
            encoded["image"] = image
            if image.region_embeds is not None and dummy_region:
                idle = image.region_embeds.sum() * 0.0
            elif image.region_embeds is not None:
                encoded["region"] = encoded_rows([image.region_embeds])
        elif self.training and not encoded:
            idle = self._idle_image(inputs_embeds)

        region_rows: Any = encoded["region"].pooler_output if encoded.get("region") is not None else []
        inputs_embeds = self._fill(input_ids, inputs_embeds, self.config.region_token_id, region_rows, "region")
        image_rows: Any = encoded["image"].pooler_output if encoded.get("image") is not None else []
        inputs_embeds = self._fill(input_ids, inputs_embeds, self.config.image_token_id, image_rows, "image")
        if isinstance(idle, torch.Tensor):
            inputs_embeds = inputs_embeds + idle.to(inputs_embeds.dtype)

        output = super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,  # pyright: ignore[reportCallIssue] - taken by a decorator
            **kwargs,
        )
        output.image_hidden_states = torch.cat(list(image_rows)) if len(image_rows) else None
        return output

    def _idle_image(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Zero, computed through tower and both projectors.

        In training each of them has to run exactly once a step on every rank, or a rank with a text-only batch (or
        one without regions) waits for gradients the others send: DDP, FSDP and ZeRO hang.
        """
        spec = describe_tower(self.config.vision)
        blank = inputs_embeds.new_zeros(1, 3, spec.image_size, spec.image_size)
        box, count = _whole_image_box(blank)
        image = self.get_image_features(blank, boxes=box, region_counts=count, return_dict=True)
        assert image.pooler_output is not None and image.region_embeds is not None
        return (image.pooler_output[0].sum() + image.region_embeds.sum()) * 0.0

    def _fill(self, input_ids, inputs_embeds: torch.Tensor, token_id: int, rows, what: str) -> torch.Tensor:
        """Put `rows` (a list of `(n, width)`) where the text holds `token_id`."""
        mask = self._placeholders(input_ids, inputs_embeds, token_id)
        expected = sum(len(row) for row in rows)
        found = int(mask.sum())
        if found != expected:
            place = "<region>" if what == "region" else "<image>"
            given = (
                f"the boxes give {expected} region embeddings" if what == "region" else f"the images give {expected}"
            )
            raise UserError(
                f"the text holds {found} {place} placeholders and {given}: "
                f"every {what} needs its placeholder(s); let RegionLlavaProcessor write the text."
            )
        if not found:
            return inputs_embeds
        values = torch.cat(list(rows)).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(mask[..., None], values)

    def _placeholders(self, input_ids, inputs_embeds: torch.Tensor | None, token_id: int) -> torch.Tensor:
        if input_ids is not None:
            return input_ids == token_id
        assert inputs_embeds is not None
        token = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)


class RegionLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """RegionLlava with its language-model head; without regions equal to plain LLaVA to the bit."""

    config: RegionLlavaConfig
    config_class = RegionLlavaConfig

    def __init__(self, config: RegionLlavaConfig):
        # Skips LlavaForConditionalGeneration.__init__, which would build a plain inner model only to have it replaced.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = RegionLlavaModel(config)
        text = config.text
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ):
        """As LLaVA's forward, with regions.

        Args:
            boxes: `(images, R_max, 4)` float32 xyxy in pixels of the `(H, W)` of `pixel_values`, padded.
            region_counts: `(images,)` rows of `boxes` that are real. Their sum is the number of `<region>` tokens.
        """
        # Named here because `generate` rejects what the signature does not name; the work is the inner model's.
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            boxes=boxes,  # pyright: ignore[reportCallIssue] - handed on to the inner model
            region_counts=region_counts,  # pyright: ignore[reportCallIssue]
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        model_kwargs = super()._prepare_multimodal_encoder_kwargs_for_generation(  # pyright: ignore
            model_kwargs
        )
        image = model_kwargs["mm_encoder_outputs"].get("image")
        rows = getattr(image, "region_embeds", None)
        if rows is not None:
            image.region_embeds = None
            model_kwargs["mm_encoder_outputs"]["region"] = encoded_rows([rows])
        return model_kwargs

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        expanded = super()._expand_multimodal_outputs(  # pyright: ignore
            input_ids, mm_encoder_output, expand_size, inputs_embeds
        )
        region = expanded.get("region")
        if region is not None and expand_size > 1:
            ids = input_ids if input_ids is not None and input_ids.numel() else None
            counts = self.model._placeholders(ids, inputs_embeds, self.config.region_token_id).sum(-1).tolist()
            per_text = torch.cat(list(region.pooler_output)).split(counts)
            # Beams of one text follow each other, and each needs all of its text's rows.
            region.pooler_output = [rows for rows in per_text for _ in range(expand_size)]
        return expanded


def encoded_rows(rows: list[torch.Tensor]) -> BaseModelOutputWithPooling:
    """Projected rows as an entry of `mm_encoder_outputs`; transformers puts lists there too, whatever it declares."""
    return BaseModelOutputWithPooling(pooler_output=rows)  # pyright: ignore[reportArgumentType]


def _any_region(boxes: torch.Tensor | None, region_counts: torch.Tensor | None) -> bool:
    if boxes is None:
        return False
    return boxes.shape[1] > 0 if region_counts is None else bool(region_counts.sum())


def _whole_image_box(pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One box over the first image of a batch, none on the others."""
    images, _, height, width = pixel_values.shape
    box = torch.tensor([0.0, 0.0, width, height], device=pixel_values.device)
    counts = torch.zeros(images, dtype=torch.long, device=pixel_values.device)
    counts[0] = 1
    return box.expand(images, 1, 4).contiguous(), counts
