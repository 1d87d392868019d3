"""Swap the tower of a checkpoint on disk, prove the result and report on it: what `regiontower swap` does."""

import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ..vision_towers import UserError, load_tower
from ..vision_towers.lift import lift_tower, plain_tower
from ..vision_towers.remote_code import new_folder
from ..vision_towers.resize import resize_tower
from .checkpoint import Checkpoint, fetch_checkpoint
from .follow_tower import family_of
from .load import DTYPES, check_loaded
from .regions import add_regions
from .swap import PROJECTOR, REGION_PROJECTOR, put_tower
from .swap_files import empty_model, put_in_place, rewrite, saved_dtype
from .swap_proof import answers_elsewhere, answers_of, difference, fits_in_memory, gap, probe_inputs
from .swap_report import commands_after, model_facts

VERIFY = ("auto", "full", "bytes")
REPORT = "swap.json"


def swap_checkpoint(
    source: str | Path,
    tower: str | Path,
    out: str | Path,
    *,
    feature_layer: int | None = None,
    image_size: int | None = None,
    keep_projector: bool = False,
    dtype: str = "auto",
    verify: str = "auto",
    regions: bool = False,
) -> dict[str, Any]:
    """Write the LLaVA at `source` with another tower, without ever holding its language model in memory.

    The folder `out` appears when everything in it is written and proved. A try that was interrupted is taken up where
    it ended. Tensors that stay are never decoded (but for another dtype); files with nothing else in them become hard
    links where the disk allows it: do not write into them.

    Args:
        source: packaged name, folder or hub id of what `swap_vision_tower` takes, in safetensors.
        tower: packaged name, folder or hub id, as of `load_tower`.
        out: a new or empty folder.
        feature_layer: `hidden_states` entry for the language model; the tower's default when absent.
        image_size: pixels a side of the tower's input; its own when absent.
        keep_projector: keep the trained projector; needs a tower of the old one's width.
        dtype: "auto" (as saved), "fp32", "bf16" or "fp16".
        verify: "bytes" compares hash, shape and dtype of every tensor that stays; "full" also opens the result in a
            fresh process (plain transformers for native towers, this package for ours) and compares logits and greedy
            ids with the swap in memory; "auto" is "full" when the weights are under 40 % of the free memory.
        regions: make a Llava a RegionLlava, a LlavaNext a RegionLlavaNext; those are so already.
    Returns:
        `{"out", "before", "after", "opens_in_plain_transformers", "proof", "to_train", "commands"}`. It also stands in
        `swap.json` in `out`, with the hashes.
    Raises:
        UserError: nothing to open there, parts that do not fit, `out` holds files, or a result that differs.
    """
    if verify not in VERIFY:
        raise UserError(f"--verify must be {', '.join(VERIFY[:-1])} or {VERIFY[-1]}, got {verify!r}.")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}.")
    out = new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = fetch_checkpoint(source)
    wanted = None if dtype == "auto" else DTYPES[dtype]

    def swapped(model: Any, processor: Any) -> tuple[Any, Any]:
        has_regions = family_of(model.config).regions
        model, processor = put_tower(
            model,
            processor,
            _tower(tower, image_size, regions or has_regions),
            feature_layer=feature_layer,
            keep_projector=keep_projector,
        )
        return add_regions(model, processor) if regions and not has_regions else (model, processor)

    old, old_processor = empty_model(checkpoint, wanted)
    before = model_facts(old, old_processor)
    new, processor = swapped(old, old_processor)
    written = rewrite(checkpoint, new, processor, out, dtype=wanted)
    native = is_native(new)
    reload = "not tried (--verify bytes)"
    if verify == "full" or (verify == "auto" and fits_in_memory(written.folder)):
        model, processor_again = swapped(*_opened(checkpoint, wanted))
        inputs = probe_inputs(processor_again, model)
        expected = answers_of(model, inputs)
        del model  # one language model at a time
        gc.collect()
        keys, found = answers_elsewhere(written.folder, not native, inputs)
        if differs := difference(keys, found, expected):
            raise UserError(f"the result differs from the swap in memory ({differs}); it was left in {written.folder}.")
        opened_by = "plain transformers" if native else "this package"
        apart = gap(found, expected)
        logits = "equal logits" if not apart else f"logits equal up to rounding (by {apart:.1g})"
        reload = f"by {opened_by} in a fresh process: no missing or unexpected keys, {logits} and equal greedy ids"
    elif verify == "auto":
        reload = "not tried: the weights are over 40 % of the free memory; --verify full insists"

    untrained = [] if keep_projector else [PROJECTOR]
    if family_of(new.config).regions and not (keep_projector and family_of(old.config).regions):
        untrained.append(REGION_PROJECTOR)
    report: dict[str, Any] = {
        "out": str(out),
        "before": asdict(before),
        "after": asdict(model_facts(new, processor)),
        "opens_in_plain_transformers": native,
        "proof": {
            "tensors": len(written.kept),
            "bytes": "all equal: keys, shapes, dtypes, sha256"
            if wanted in (None, saved_dtype(checkpoint))
            else f"all equal to the source's, rounded to {dtype}: keys, shapes, sha256",
            "linked_files": written.linked,
            "resumed_files": written.resumed,
            "reload": reload,
        },
        "to_train": untrained,
        "commands": commands_after(new.config.model_type, str(out)),
    }
    hashes = {name: asdict(proof) for name, proof in sorted(written.kept.items())}
    (written.folder / REPORT).write_text(json.dumps({**report, "kept": hashes}, indent=1) + "\n", encoding="utf-8")
    put_in_place(written.folder, out)
    return report


def is_native(model: PreTrainedModel) -> bool:
    """Whether plain transformers knows the model's class and that of its tower."""
    parts: Any = model
    return all(type(part).__module__.startswith("transformers.") for part in (model, parts.model.vision_tower))


def _tower(name: str | Path, image_size: int | None, regions: bool) -> PreTrainedModel:
    tower = load_tower(name)
    if image_size is not None:
        tower = resize_tower(tower, image_size)
    return lift_tower(tower) if regions else plain_tower(tower)


def _opened(checkpoint: Checkpoint, dtype: torch.dtype | None) -> tuple[Any, Any]:
    _, processor = empty_model(checkpoint, dtype)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        checkpoint.folder, dtype=dtype or saved_dtype(checkpoint), output_loading_info=True
    )
    model, info = loaded
    check_loaded(str(checkpoint.folder), info)
    return model, processor
