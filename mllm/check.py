"""Whether a LLaVA's configuration, processor and tower agree: the mistakes that no error message tells of.

Each check looks at one thing that has gone wrong in published checkpoints and yields a finding, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..vision_towers import TowerSpec
from .check_tokens import context, placeholders, prefix, tokens
from .checked import Checked, look_at
from .findings import Finding, errors_first

TOWER = "vision_tower"


def check_model(name_or_path: str | Path) -> list[Finding]:
    """What is wrong with a Llava, LlavaNext, LlavaOnevision, VipLlava, RegionLlava or RegionLlavaNext; errors first.

    Args:
        name_or_path: a packaged model, folder or hub id, with its processor, or a LoRA run directory. Weights are not
            read.
    Raises:
        UserError: nothing to open there, or no model with a vision tower.
    """
    return errors_first(findings_of(look_at(name_or_path)))


def findings_of(checked: Checked) -> Iterator[Finding]:
    """The same of a model that is open, as they come."""
    for check in CHECKS:
        yield from check(checked)


def input_size(name: str, side: int, spec: TowerSpec) -> Iterator[Finding]:
    """Whether a tower takes a square of `side` pixels; `name` is what has this size. Its own size need be no multiple
    of the patch: a convolution leaves the last pixels out (SigLIP-so400m/14 at 384)."""
    if side == spec.image_size or (spec.any_resolution and side % spec.patch_size == 0):
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


def _adapter(checked: Checked) -> Iterator[Finding]:
    """LoRA patterns such as "q_proj" are found in towers too."""
    if checked.adapter is None or not checked.adapter.target_modules:
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    names = [name for name, _ in checked.model.named_modules() if TOWER in name]
    hit = [name for name in names if check_target_module_exists(checked.adapter, name)]
    if hit:
        yield Finding(
            "warning",
            f"the adapter's patterns hit {len(hit)} modules of the tower, {hit[0]} first",
            "the tower is tuned along with the language model",
            "anchor the patterns at the language model (`.*language_model.*q_proj`), unless it is meant",
        )


Check = Callable[[Checked], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (tokens, prefix, _pixels, _crop, _resolution, placeholders, context, _adapter)
