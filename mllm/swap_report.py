"""What a swap changes, in numbers: image tokens, context, parameters, work and memory; and what has to be trained."""

import copy
import json
import shlex
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from ..vision_towers import describe_tower
from .processing import RegionLlavaProcessor
from .regions import CONFIGS

GIB = 2**30
BYTES_FROZEN = 4  # training keeps float32 weights
BYTES_TRAINED = 16  # weight, gradient and the two moments of AdamW, all float32


@dataclass(frozen=True)
class ModelFacts:
    """One model in numbers.

    Args:
        tower: its `model_type`. image_size, patch_size: pixels. feature_layer: as in the configuration.
        image_tokens: most tokens that one picture takes. views: how many squares of it the tower then sees.
        context: most tokens that the language model takes; None when its configuration does not say.
        context_used: share of it that one picture takes.
        tower_parameters, projector_parameters, language_parameters: how many.
        tower_gflops: of all views of one picture. language_gflops: of reading its image tokens.
        stage1_gib: memory of training the projectors. stage2_gib: of training the language model, too. Both are
            weights, gradients and AdamW; activations come on top.
    """

    tower: str
    image_size: int
    patch_size: int
    feature_layer: Any
    image_tokens: int
    views: int
    context: int | None
    context_used: float | None
    tower_parameters: int
    projector_parameters: int
    language_parameters: int
    tower_gflops: float
    language_gflops: float
    stage1_gib: float
    stage2_gib: float


def model_facts(model: Any, processor: Any) -> ModelFacts:
    """The facts about a LLaVA or a RegionLlava, with weights or on the meta device."""
    config = model.config
    spec = describe_tower(config.vision_config)
    tokens, views = image_tokens(config, processor)
    tower = _parameters(model.model.vision_tower)
    projectors = sum(_parameters(child) for name, child in model.model.named_children() if "projector" in name)
    whole = _parameters(model)
    language = whole - tower - projectors
    read_by_all = language - _parameters(model.get_input_embeddings())
    context = getattr(config.text_config, "max_position_embeddings", None)
    return ModelFacts(
        tower=config.vision_config.model_type,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        feature_layer=config.vision_feature_layer,
        image_tokens=tokens,
        views=views,
        context=context,
        context_used=None if context is None else round(tokens / context, 4),
        tower_parameters=tower,
        projector_parameters=projectors,
        language_parameters=language,
        tower_gflops=_rounded(tower_flops(config.vision_config) * views / 1e9),
        language_gflops=_rounded(2 * read_by_all * tokens / 1e9),
        stage1_gib=_rounded((BYTES_FROZEN * (tower + language) + BYTES_TRAINED * projectors) / GIB),
        stage2_gib=_rounded((BYTES_FROZEN * tower + BYTES_TRAINED * (language + projectors)) / GIB),
    )


def image_tokens(config: Any, processor: Any) -> tuple[int, int]:
    """(most image tokens of one picture, views of it that the tower then sees), by the model's own processor."""
    ours = isinstance(processor, RegionLlavaProcessor)
    side = processor.image_size if ours else describe_tower(config.vision_config).image_size
    sizes = getattr(config, "image_grid_pinpoints", None) or [[side, side]]
    if ours:
        counts = [processor.image_tokens(processor.frame((width, height))) for height, width in sizes]
    else:
        counts = processor._get_num_multimodal_tokens(image_sizes=[tuple(size) for size in sizes])["num_image_tokens"]
    most, (height, width) = max(zip(counts, sizes, strict=True))
    tiles = (height // side) * (width // side)
    return most, tiles + 1 if hasattr(config, "image_grid_pinpoints") else 1


def tower_flops(config: Any) -> int:
    """Floating point operations of a tower on one square picture, counted on the meta device.

    The blocks of a ViT are alike: one and two of them tell of any number, and are counted ten times as fast.
    """
    one, two = (_counted_flops(config, blocks) for blocks in (1, 2))
    return one + (config.num_hidden_layers - 1) * (two - one)


def _counted_flops(config: Any, blocks: int) -> int:
    config = copy.deepcopy(config)
    config.num_hidden_layers = blocks
    side = describe_tower(config).image_size
    with torch.device("meta"):
        tower: Any = AutoModel.from_config(config).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            tower(torch.zeros(1, 3, side, side, dtype=tower.dtype))
    return counter.get_total_flops()


def commands_after(kind: str, out: str) -> list[str]:
    """The commands that train a swapped model's new parts. Our stages train a RegionLlava or RegionLlavaNext, and make
    one of a Llava or LlavaNext; for other kinds there are none.

    Args:
        kind: the `model_type` that was written.
    """
    if kind not in (*CONFIGS, *(config.model_type for config in CONFIGS.values())):
        return []
    whole = shlex.quote(f"model={{mllm: {json.dumps(out)}}}")
    return [
        f"regiontower align align-real --out runs/stage1 --set {whole} --set data.root=DATA",
        "regiontower instruct instruct-real --out runs/stage2 --set model.mllm=runs/stage1 --set data.root=DATA "
        "--set lr.tower=0 --set lr.language_model=2e-5 --set lr.projector=2e-5 --set lr.region_projector=2e-5",
    ]


ROWS = {
    "tower": "tower",
    "image_size": "input, px",
    "patch_size": "patch, px",
    "feature_layer": "hidden state read",
    "image_tokens": "image tokens, at most",
    "views": "views of such a picture",
    "context_used": "context used by them",
    "tower_parameters": "parameters: tower",
    "projector_parameters": "parameters: projectors",
    "language_parameters": "parameters: language model",
    "tower_gflops": "GFLOPs a picture: tower",
    "language_gflops": "GFLOPs a picture: language model",
    "stage1_gib": "GiB to train the projectors",
    "stage2_gib": "GiB to train the language model, too",
}


def swap_table(report: dict[str, Any]) -> str:
    """The report of `swap_checkpoint` to read."""
    lines = [("", "before", "after")]
    lines += [
        (label, _cell(key, report["before"][key]), _cell(key, report["after"][key])) for key, label in ROWS.items()
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    proof = report["proof"]
    said = [
        table,
        "(GiB: weights, gradients and AdamW in float32; activations come on top)",
        f"language model: {proof['tensors']} tensors, {proof['bytes']}",
        f"reloaded: {proof['reload']}",
        f"untrained: {', '.join(report['to_train']) or 'nothing'}",
        *(report["commands"] or ["(any trainer of LLaVAs trains the projector; our stages train a RegionLlava)"]),
        f"written: {report['out']}",
    ]
    return "\n".join(said)


def _cell(key: str, value: Any) -> str:
    if key == "context_used":
        return "?" if value is None else f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
