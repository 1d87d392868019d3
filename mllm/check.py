"""Whether a LLaVA's configuration, processor and tower agree: the mistakes that no error message tells of.

Each check looks at one thing that has gone wrong in published checkpoints and yields a finding, or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..vision_towers import TowerSpec, UserError, describe_tower
from ..vision_towers.packaged import model_source
from .config import RegionLlavaConfig, RegionParts
from .follow_tower import FAMILIES
from .processing import RegionLlavaProcessor
from .projectors import image_token_count
from .swap_report import image_tokens

ADAPTER_FILE = "adapter_config.json"
TOWER = "vision_tower"


@dataclass(frozen=True)
class Finding:
    """level: "error" (it cannot be right) or "warning" (it may be meant). what: is the case. why: that matters. mend:
    what to do."""

    level: Literal["error", "warning"]
    what: str
    why: str
    mend: str

    def line(self) -> str:
        """In one line."""
        return f"{self.level}: {self.what}; {self.why}; {self.mend}"


@dataclass(frozen=True)
class Checked:
    """config: of the whole model. spec: of its tower. side: pixels of the square that the tower gets; None where the
    processor decides by the picture. folder: where the model stands."""

    config: Any
    spec: TowerSpec
    processor: Any
    side: int | None
    folder: Path

    @property
    def strategy(self) -> str:
        """`default` drops the first token of the tower, `full` keeps it."""
        return _strategy(self.config)

    @property
    def pinpoints(self) -> list[list[int]]:
        """Height and width of what tiles are cut from; none for a model without tiles."""
        return [list(point) for point in getattr(self.config, "image_grid_pinpoints", None) or []]

    @cached_property
    def model(self) -> Any:
        """Without weights."""
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.config).eval()


def check_model(name_or_path: str | Path) -> list[Finding]:
    """What is wrong with a Llava, LlavaNext, LlavaOnevision, VipLlava, RegionLlava or RegionLlavaNext; errors first.

    Args:
        name_or_path: a packaged model, folder or hub id, with its processor. Weights are not read.
    Raises:
        UserError: nothing to open there, or no model with a vision tower.
    """
    source = model_source(name_or_path)
    try:
        config: Any = AutoConfig.from_pretrained(source)
        processor: Any = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"no model can be opened at {source!r}: {str(error).splitlines()[0]}") from error
    if not hasattr(config, "vision_config") or not _strategy(config):
        raise UserError(f"{source!r} is a {config.model_type}; only LLaVA-style models can be checked.")
    checked = Checked(config, describe_tower(config.vision_config), processor, _side(processor), Path(source))
    return errors_first(finding for check in CHECKS for finding in check(checked))


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """In the order of their level, and else as they come."""
    return sorted(findings, key=lambda finding: finding.level != "error")


def input_size(name: str, side: int, spec: TowerSpec) -> Iterator[Finding]:
    """Whether a tower takes a square of `side` pixels; `name` is what has this size."""
    if side % spec.patch_size == 0 and (side == spec.image_size or spec.any_resolution):
        return
    can = f"a multiple of {spec.patch_size}" if spec.any_resolution else str(spec.image_size)
    yield Finding(
        "error",
        f"{name} is {side}, and this tower takes {can} px",
        "the rest of each row of patches is lost"
        if spec.any_resolution
        else f"its {spec.positions} positions are for {spec.image_size} px: it fails, or positions are guessed",
        f"set {name} to {can}",
    )


def report(findings: list[Finding]) -> dict[str, Any]:
    """For `--json`."""
    return {
        "errors": sum(finding.level == "error" for finding in findings),
        "warnings": sum(finding.level == "warning" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _strategy(config: Any) -> str:
    """What a LLaVA does with its tower's first token; nothing for another model."""
    family = FAMILIES.get(config.model_type)
    always = "default" if family is not None and family.drops_first else ""
    return always or getattr(config, "vision_feature_select_strategy", "")


def _side(processor: Any) -> int | None:
    if isinstance(processor, RegionLlavaProcessor):
        return None if processor.row_end else processor.image_size
    image_processor = processor.image_processor
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    found = {size[key] for key in ("height", "width", "shortest_edge") if size and key in size}
    return found.pop() if len(found) == 1 else None


def _tokens(checked: Checked) -> Iterator[Finding]:
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
    if isinstance(config, RegionLlavaConfig):
        made = image_token_count((rows, columns), config.merge_size, config.row_end)
        written = processor.image_tokens(processor.frame((checked.side, checked.side)))
    else:
        made = rows * columns + spec.num_prefix_tokens - (checked.strategy == "default")
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


def _prefix(checked: Checked) -> Iterator[Finding]:
    """Class token and registers: dropped where they are, kept where they are not."""
    prefix = checked.spec.num_prefix_tokens
    if checked.strategy == "default" and prefix == 0:
        yield Finding(
            "error",
            "the strategy 'default' drops token 0, and this tower has no class token",
            "the first patch of every picture is lost and all others move by one",
            "set vision_feature_select_strategy to 'full' in model and processor",
        )
    elif checked.strategy == "default" and prefix > 1:
        yield Finding(
            "error",
            f"the strategy 'default' drops one token, and this tower has {prefix} before its patches",
            f"{prefix - 1} registers are taken for patches, and every patch moves",
            "load the tower through regiontower, which trims them (`regiontower swap`)",
        )
    elif checked.strategy == "full" and prefix and not isinstance(checked.config, RegionParts):
        yield Finding(
            "warning",
            f"{prefix} tokens that are no patches stay among the image tokens",
            "patch n of the grid is not token n of the image",
            "set vision_feature_select_strategy to 'default' if the projector was not trained so",
        )


def _pixels(checked: Checked) -> Iterator[Finding]:
    """The colours that the tower was trained with."""
    used, spec = checked.processor.image_processor, checked.spec
    for name in ("image_mean", "image_std"):
        given, wanted = getattr(used, name), getattr(spec, name)
        if given is None or max(abs(a - b) for a, b in zip(given, wanted, strict=True)) > 0.01:
            yield Finding(
                "warning",
                f"{name} of the processor is {given}, the tower's kind uses {[round(v, 4) for v in wanted]}",
                "the tower sees colours it was not trained on",
                f"set {name}, unless the tower's own preprocessor_config.json says otherwise",
            )
    if not getattr(used, "do_normalize", True):
        yield Finding("error", "pixels are not normalised", "the tower sees values far too large", "set do_normalize")


def _crop(checked: Checked) -> Iterator[Finding]:
    """What is cut off cannot be found."""
    used = checked.processor.image_processor
    if getattr(used, "do_center_crop", False) and not getattr(used, "do_pad", False):
        yield Finding(
            "warning",
            "pictures are cropped at the centre",
            "boxes near the edges lie outside of what the tower sees",
            "pad to a square instead (do_pad, LlavaImageProcessor), as `regiontower swap` does",
        )


def _resolution(checked: Checked) -> Iterator[Finding]:
    """A table of positions has one size."""
    if checked.side is not None:
        yield from input_size("the size of the input", checked.side, checked.spec)


def _placeholders(checked: Checked) -> Iterator[Finding]:
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


def _context(checked: Checked) -> Iterator[Finding]:
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


def _adapter(checked: Checked) -> Iterator[Finding]:
    """LoRA patterns such as "q_proj" are found in towers too."""
    path = checked.folder / ADAPTER_FILE
    if not path.is_file():
        return
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    adapter = LoraConfig(**{"target_modules": json.loads(path.read_text(encoding="utf-8"))["target_modules"]})
    names = [name for name, _ in checked.model.named_modules() if TOWER in name]
    hit = [name for name in names if check_target_module_exists(adapter, name)]
    if hit:
        yield Finding(
            "warning",
            f"the adapter's patterns hit {len(hit)} modules of the tower, {hit[0]} first",
            "the tower is tuned along with the language model",
            "anchor the patterns at the language model (`.*language_model.*q_proj`), unless it is meant",
        )


Check = Callable[[Checked], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (_tokens, _prefix, _pixels, _crop, _resolution, _placeholders, _context, _adapter)
