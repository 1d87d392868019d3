"""What every LLaVA with `<region>` placeholders has in common, whatever views it has of a picture.

How regions travel through `generate` of transformers 5.23: it calls `get_image_features` before the first step, pops
every argument that method names, expands what came back for beams, and hands it to `forward` as `mm_encoder_outputs`
at prefill only. Region embeddings are their own entry there, `mm_encoder_outputs["region"]`: rows of all texts, flat,
in the order of the placeholders. Inside the image entry they would be cut wrongly by chunked prefill.
"""

import math
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from ..vision_towers import TowerFeatures, TowerOutput, UserError, describe_tower


class RegionModel:
    """For the inner model, before a LLaVA's: fills `<region>` and `<image>` and hands the rest on.

    The class that mixes it in has a `region_projector`; a `get_image_features` that takes boxes and gives a
    `TowerOutput` with their projected rows; and `blank_picture(like)`, the `pixel_values` of one black picture and what
    else `get_image_features` needs of it, in the dtype and on the device of the tensor `like`.
    """

    config: Any
    region_projector: Any
    vision_tower: Any
    training: bool

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
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ):
        """As LLaVA's inner forward, with `boxes` and `region_counts` as in `get_image_features`.

        Raises:
            UserError: placeholders in the text and what should fill them differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds.")
        if pixel_values is not None and mm_encoder_outputs:
            raise UserError("give either pixel_values or mm_encoder_outputs.")
        if boxes is not None and pixel_values is None:
            raise UserError("boxes need the pixel_values they lie on.")
        this: Any = self
        whole: Any = super()
        if inputs_embeds is None:
            inputs_embeds = this.get_input_embeddings()(input_ids)
        assert inputs_embeds is not None

        encoded = dict(mm_encoder_outputs or {})
        idle: torch.Tensor | float = 0.0
        if pixel_values is not None:
            encode_boxes, encode_counts, dummy_region = boxes, region_counts, False
            if self.training and not _any_region(boxes, region_counts):
                encode_boxes, encode_counts = _whole_image_box(pixel_values)
                dummy_region = True
            sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
            image: TowerOutput = this.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                boxes=encode_boxes,
                region_counts=encode_counts,
                return_dict=True,
                **sizes,
            )
            encoded["image"] = image
            if image.region_embeds is not None and dummy_region:
                idle = image.region_embeds.sum() * 0.0
            elif image.region_embeds is not None:
                encoded["region"] = encoded_rows([image.region_embeds])
        elif (kept := encoded.get("image")) is not None and kept.pooler_output is None:
            encoded, idle = self._project_kept(kept)
        elif self.training and not encoded:
            idle = self._idle_image(inputs_embeds)

        region_rows: Any = encoded["region"].pooler_output if encoded.get("region") is not None else []
        inputs_embeds = self._fill(input_ids, inputs_embeds, self.config.region_token_id, region_rows, "region")
        image_rows: Any = encoded["image"].pooler_output if encoded.get("image") is not None else []
        inputs_embeds = self._fill(input_ids, inputs_embeds, self.config.image_token_id, image_rows, "image")
        if isinstance(idle, torch.Tensor):
            inputs_embeds = inputs_embeds + idle.to(inputs_embeds.dtype)

        output = whole.forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        # transformers 5.23 hands out the rows, 5.24 what held them (`image_hidden_states` then reads it there).
        if hasattr(output, "image_outputs"):
            output.image_outputs = encoded.get("image")
        else:
            output.image_hidden_states = torch.cat(list(image_rows)) if len(image_rows) else None
        return output

    def _idle_image(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Zero, computed through tower and both projectors.

        In training each of them has to run exactly once a step on every rank, or a rank with a text-only batch (or
        one without regions) waits for gradients the others send: DDP, FSDP and ZeRO hang.
        """
        this: Any = self
        blank: dict[str, torch.Tensor] = this.blank_picture(inputs_embeds)
        box, count = _whole_image_box(blank["pixel_values"])
        image: TowerOutput = this.get_image_features(**blank, boxes=box, region_counts=count, return_dict=True)
        assert image.pooler_output is not None and image.region_embeds is not None
        return (image.pooler_output[0].sum() + image.region_embeds.sum()) * 0.0

    def _project_kept(self, kept: Any) -> tuple[dict[str, BaseModelOutputWithPooling], torch.Tensor | float]:
        """What was kept of the tower (a feature cache) through both projectors.

        kept: `last_hidden_state` `(images, tokens, width)`, what the image projector takes, of square inputs, and
        `region_embeds` `(rows, region_dim)`. Either may have no row: a projector then gets one of zeros, because each
        has to run on every rank (see `_idle_image`).
        Returns:
            Entries of `mm_encoder_outputs`, and zero.
        """
        this: Any = self
        tokens, regions = kept.last_hidden_state, kept.region_embeds
        dtype = next(self.region_projector.parameters()).dtype
        side = math.isqrt(tokens.shape[1]) * describe_tower(this.config.vision).patch_size
        image = this.project_image(
            (tokens if len(tokens) else tokens.new_zeros(1, *tokens.shape[1:])).to(dtype), (side, side)
        )
        region = self.region_projector((regions if len(regions) else regions.new_zeros(1, regions.shape[1])).to(dtype))
        encoded = {}
        idle: torch.Tensor | float = 0.0
        for name, rows, real in (("image", image, len(tokens)), ("region", region, len(regions))):
            if real:
                encoded[name] = encoded_rows(list(rows) if name == "image" else [rows])
            else:
                idle = idle + rows.sum() * 0.0
        return encoded, idle

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
                f"every {what} needs its placeholder(s); let the model's own processor write the text."
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
        this: Any = self
        return (inputs_embeds == this.get_input_embeddings()(token)).all(-1)


class RegionGeneration:
    """For the model with its head, before a LLaVA's: region rows find their way through `generate`."""

    config: Any
    model: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ):
        """As the LLaVA's own forward, with regions.

        Args:
            image_sizes: height and width of the originals, for a model with tiles.
            boxes, region_counts: as of the inner model's `get_image_features`; the sum of the counts is the number of
                `<region>` tokens.
        """
        # Named here because `generate` rejects what the signature does not name; the work is the inner model's.
        whole: Any = super()
        return whole.forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            boxes=boxes,
            region_counts=region_counts,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        whole: Any = super()
        model_kwargs = whole._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        image = model_kwargs["mm_encoder_outputs"].get("image")
        rows = getattr(image, "region_embeds", None)
        if rows is not None:
            image.region_embeds = None
            model_kwargs["mm_encoder_outputs"]["region"] = encoded_rows([rows])
        return model_kwargs

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        whole: Any = super()
        expanded = whole._expand_multimodal_outputs(input_ids, mm_encoder_output, expand_size, inputs_embeds)
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
    """One box over the first (view of the first) image of a batch, none on the others."""
    images, height, width = pixel_values.shape[0], pixel_values.shape[-2], pixel_values.shape[-1]
    box = torch.tensor([0.0, 0.0, width, height], device=pixel_values.device)
    counts = torch.zeros(images, dtype=torch.long, device=pixel_values.device)
    counts[0] = 1
    return box.expand(images, 1, 4).contiguous(), counts
