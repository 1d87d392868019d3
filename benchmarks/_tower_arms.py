"""What `bench towers` trains, and which figure of which arm should be above which."""

from dataclasses import dataclass, replace
from typing import Any

_SIZE = {
    "hidden_size": 128,
    "layers": 4,
    "heads": 4,
    "intermediate_size": 512,
    "patch_size": 14,
    "image_size": 112,
    "num_region_layers": 2,
}
_TEXT = {"embed_dim": 128, "text_hidden": 128, "text_layers": 2, "text_heads": 4, "max_tokens": 64}
COMMON = {
    "model.tower": None,
    "model.keep_heads": False,
    "model.size": _SIZE,
    "data.augment.zoom": 0.7,
    "train.compile": False,
    "train.precision": "fp32",  # quick on every processor; bf16 is so on few
    "train.save_steps": 100,
}


@dataclass(frozen=True)
class Arm:
    """recipe: what is trained. changes: of its keys. readouts: how the probe reads regions. ablation: whether it has a
    share of the steps only."""

    recipe: str
    changes: dict[str, Any]
    readouts: tuple[str, ...] = ("own",)
    ablation: bool = False


_SEES = ("value", "crops")
# CLIP reads captions of whole images, as CLIP does. `clip_views` is told of every view what is in it, which takes the
# boxes of its objects: it is no CLIP any more, and shows how much of the difference those words alone make.
MAIN = {
    "clip": Arm("clip-nano", {"data.captions": "image", "model.clip": _TEXT}, _SEES),
    "clip_views": Arm("clip-nano", {"data.captions": "visible", "model.clip": _TEXT}, _SEES),
    "rice": Arm("rice-nano", {}),
    "cloc": Arm("cloc-nano", {"model.cloc.text": _TEXT}),  # whose keys are for texts learned from nothing
    "umg_clip": Arm("umg-clip-nano", {"model.umg_clip.text": _TEXT}),
}
_SHORT = {name: replace(arm, ablation=True) for name, arm in MAIN.items() if arm.readouts == ("own",)}


def _changed(arm: str, **changes: Any) -> Arm:
    short = _SHORT[arm]
    return replace(short, changes=short.changes | {key.replace("__", "."): value for key, value in changes.items()})


def _without(*terms: str) -> dict[str, float]:
    return {f"model.umg_clip.loss.{term}_{texts}": 0.0 for term in terms for texts in ("caption", "tag")}


# Name -> the arm; `_short` ones are what they are compared with.
ABLATIONS = {
    "rice_short": _SHORT["rice"],
    "rice_no_ocr": _changed("rice", data__tokenizer=None),
    **{f"rice_n{count}": _changed("rice", data__regions_per_image=count) for count in (1, 5, 10, 20)},
    **{f"rice_rho_{rho}": _changed("rice", model__rice__loss__sample_rate=rho) for rho in (0.1, 0.5)},
    "cloc_short": _SHORT["cloc"],
    "cloc_no_filter": _changed("cloc", model__cloc__loss__same_above=None),
    "cloc_filter_0.9": _changed("cloc", model__cloc__loss__same_above=0.9),
    "cloc_image_pool": _changed("cloc", model__cloc__prompter_pool="image"),
    "cloc_roi_align": _changed("cloc", model__cloc__region_pool="roi_align"),
    "umg_clip_short": _SHORT["umg_clip"],
    "umg_clip_no_region": _changed("umg_clip", **_without("region")),
    "umg_clip_no_pixel": _changed("umg_clip", **_without("pixel")),
    "umg_clip_image_only": _changed("umg_clip", **_without("region", "pixel")),
}
ARMS = MAIN | ABLATIONS


@dataclass(frozen=True)
class Sign:
    """`figure` of `arm` is above that of `other` by at least `least`. why: who says so. readout, other_readout: of the
    two."""

    arm: str
    other: str
    figure: str
    why: str
    least: float = 0.0
    readout: str = "own"
    other_readout: str = "own"


_RICE, _CLOC, _UMG = "RICE, Table 5", "CLOC, Table 2", "UMG-CLIP: all levels help"
SIGNS = (
    *(Sign(name, "clip", "linear", "ours", 0.15, other_readout="value") for name in ("rice", "cloc", "umg_clip")),
    Sign("clip_views", "clip", "linear", "ours", readout="value", other_readout="value"),
    *(Sign(name, "clip_views", "linear", "ours", other_readout="value") for name in ("rice", "cloc", "umg_clip")),
    Sign("rice_short", "rice_no_ocr", "reading_linear", "RICE: text regions teach reading"),
    *(Sign("rice_n10", f"rice_n{count}", "linear", _RICE) for count in (1, 5, 20)),
    Sign("rice_rho_0.1", "rice_rho_0.5", "linear", _RICE),
    Sign("rice_rho_0.1", "rice_short", "linear", "MLCD, of rho 0.1 and 1"),
    Sign("rice_rho_0.1", "rice_rho_0.5", "knn", _RICE),
    Sign("rice_rho_0.1", "rice_short", "knn", "MLCD, of rho 0.1 and 1"),
    Sign("cloc_short", "cloc_roi_align", "text_to_region_r1", _CLOC),
    Sign("cloc_short", "cloc_roi_align", "text_to_region_r10", _CLOC),
    Sign("cloc_short", "cloc_no_filter", "zero_shot", _CLOC),
    Sign("cloc_filter_0.9", "cloc_no_filter", "zero_shot", _CLOC),
    Sign("cloc_short", "cloc_image_pool", "zero_shot", "ours"),
    Sign("umg_clip_short", "umg_clip_no_region", "linear", _UMG),
    Sign("umg_clip_short", "umg_clip_no_region", "text_to_region_r10", _UMG),
    Sign("umg_clip_short", "umg_clip_no_pixel", "linear", _UMG),
    Sign("umg_clip_short", "umg_clip_no_pixel", "text_to_region_r10", _UMG),
    Sign("umg_clip_short", "umg_clip_no_pixel", "zero_shot_masks", _UMG),
    Sign("umg_clip_short", "umg_clip_image_only", "linear", _UMG),
)
