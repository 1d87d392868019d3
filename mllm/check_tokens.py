"""Whether a LLaVA's processor writes as many placeholders as its tower makes features, and the model counts them so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from .checked import Checked
from .config import RegionLlavaConfig, RegionParts
from .findings import Finding
from .processing import RegionLlavaProcessor
from .projectors import image_token_count
from .swap_report import image_tokens


def tokens(checked: Checked) -> Iterator[Finding]:
    """As many placeholders as features, of one view: the processor counts the ones, the model makes the others."""
    config, spec, processor = checked.config, checked.spec, checked.processor
    patch = getattr(processor, "patch_size", spec.patch_size)  # LlavaOnevision's counts tokens
    if patch != spec.patch_size:
        yield Finding(
            "error",
            f"the processor counts patches of {patch} px, the tower's have {spec.patch_size}",
            "the number of image tokens in the text is wrong",
            f"set patch_size of the processor to {spec.patch_size}",
        )
        return
    if checked.side is None:
        return
    rows, columns = spec.grid(checked.side, checked.side)
    made = spec.num_prefix_tokens - (checked.strategy == "default")
    if isinstance(config, RegionLlavaConfig):
        made += image_token_count((rows, columns), config.merge_size, config.row_end)
        written = processor.image_tokens(processor.frame((checked.side, checked.side)))
    else:
        made += rows * columns
        written = rows * columns + _more_tokens(processor, rows * columns)
    if made != written:
        yield Finding(
            "error",
            f"the processor writes {written} placeholders for {checked.side} px, the model makes {made} features",
            "the forward pass fails, or features land on the wrong places",
            f"set vision_feature_select_strategy of the processor to the model's ({checked.strategy!r}) and "
            f"num_additional_image_tokens to the tokens before the tower's patches, {spec.num_prefix_tokens} "
            f"(num_image_tokens to {rows * columns + spec.num_prefix_tokens})",
        )
        return
    yield from _tiles(checked)
    length = getattr(config, "image_seq_length", None)
    if length is not None and length != made:
        yield Finding(
            "warning",
            f"image_seq_length is {length}, a view has {made} tokens",
            "what plans memory by it (caches, servers) plans wrongly",
            f"set it to {made}",
        )


def _more_tokens(processor: Any, patches: int) -> int:
    """Placeholders of a view beyond its patches, as the plain processors count them."""
    if isinstance(processor, RegionLlavaProcessor):
        return 0
    whole = getattr(processor, "num_image_tokens", None)  # LlavaOnevision says how many in all
    more = processor.num_additional_image_tokens if whole is None else whole - patches
    return more - (processor.vision_feature_select_strategy == "default")


def _tiles(checked: Checked) -> Iterator[Finding]:
    """What the processor cuts is what the model puts together; found by doing both, without weights."""
    if not checked.pinpoints:
        return
    used = [list(point) for point in checked.processor.image_processor.image_grid_pinpoints]
    if used != checked.pinpoints:
        yield Finding(
            "error",
            f"image_grid_pinpoints of the image processor are {used}, those of the model {checked.pinpoints}",
            "pictures are cut in one way and put together in another",
            "set both to the same",
        )
        return
    options: dict[str, Any] = {} if isinstance(checked.processor, RegionLlavaProcessor) else {"return_tensors": "pt"}
    for height, width in checked.pinpoints:
        picture, text = Image.new("RGB", (width, height)), checked.processor.image_token
        inputs = checked.processor(images=[picture], text=[text], **options)
        written = int((inputs["input_ids"] == checked.config.image_token_id).sum())
        try:
            with torch.no_grad():
                rows = checked.model.model.get_image_features(
                    inputs["pixel_values"].to("meta", checked.model.dtype), inputs["image_sizes"], return_dict=True
                ).pooler_output
            made = str(sum(len(row) for row in rows))
        except (ValueError, RuntimeError) as error:
            made = f"none ({str(error).splitlines()[0]})"
        if made != str(written):
            yield Finding(
                "error",
                f"the processor writes {written} placeholders for {width} x {height} px, the model makes {made}",
                "the forward pass fails, or features land on the wrong places",
                f"set image_grid_pinpoints of both to multiples of the tile's {checked.spec.image_size} px",
            )
            return


def prefix(checked: Checked) -> Iterator[Finding]:
    """Class token and registers: dropped where they are, kept where they are not."""
    before = checked.spec.num_prefix_tokens
    if checked.strategy == "default" and before == 0:
        yield Finding(
            "error",
            "the strategy 'default' drops token 0, and this tower has no class token",
            "the first patch of every picture is lost and all others move by one",
            "set vision_feature_select_strategy to 'full' in model and processor",
        )
    elif checked.strategy == "default" and before > 1:
        yield Finding(
            "error",
            f"the strategy 'default' drops one token, and this tower has {before} before its patches",
            f"{before - 1} registers are taken for patches, and every patch moves",
            "load the tower through regiontower, which trims them (`regiontower swap`)",
        )
    elif checked.strategy == "full" and before and not isinstance(checked.config, RegionParts):
        yield Finding(
            "warning",
            f"tokens that are no patches, {before}, stay among the image tokens",
            "patch n of the grid is not token n of the image",
            "set vision_feature_select_strategy to 'default' if the projector was not trained so",
        )


def placeholders(checked: Checked) -> Iterator[Finding]:
    """The token that image features replace is the one that the processor writes."""
    tokenizer, config = checked.processor.tokenizer, checked.config
    pairs = [("image", "image_token", config.image_token_id)]
    if isinstance(config, RegionParts):
        pairs.append(("region", "region_token", config.region_token_id))  # pyright: ignore
    for name, attribute, wanted in pairs:
        text = getattr(checked.processor, attribute, f"<{name}>")
        written = tokenizer.convert_tokens_to_ids(text)
        if written != wanted:
            yield Finding(
                "error",
                f"{text} is token {written} of the tokenizer, the model looks for {wanted}",
                "no feature finds its place",
                f"set the model's {name}_token_index to {written}",
            )


def context(checked: Checked) -> Iterator[Finding]:
    """Image tokens, and room for words."""
    longest = getattr(checked.config.text_config, "max_position_embeddings", None)
    if checked.side is None or longest is None:
        return
    most, _ = image_tokens(checked.config, checked.processor)
    if most >= longest:
        yield Finding(
            "error",
            f"a picture is up to {most} tokens, the language model reads {longest}",
            "there is no room for a question",
            "take a smaller input or fewer tiles, or the projector merge2x2_mlp",
        )
