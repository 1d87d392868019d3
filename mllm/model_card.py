"""README.md of a saved RegionLlava, or of the plain LLaVA made from it."""

import json
from pathlib import Path
from typing import Any

from ..vision_towers import describe_tower
from ..vision_towers.model_card import (
    CardFacts,
    Rows,
    brings_code,
    code,
    native,
    needed,
    read_config,
    source_line,
    weight_rows,
    write_card,
)
from .config import RegionLlavaConfig, RegionParts
from .prompts import IMAGE_TOKEN, REFER, REGION_TOKEN


def write_mllm_card(folder: str | Path, facts: CardFacts | None = None) -> Path:
    """README.md for a folder that holds a `region_llava` or `region_llava_next`, or a plain LLaVA.

    Raises:
        UserError: no model stands in the folder.
    """
    folder, facts = Path(folder), facts or CardFacts()
    config: Any = read_config(folder)
    regions = isinstance(config, RegionParts)
    fields = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    spec = describe_tower(config.vision_config)
    text = "A language model that sees pictures" + (
        f": `{REGION_TOKEN}` in a question stands for a box, and answers may hold boxes."
        if regions
        else "; made from a RegionLlava, without its regions."
    )
    rows: Rows = [
        ("type", f"`{config.model_type}`"),
        *weight_rows(folder),
        (
            "vision tower",
            f"`{config.vision_config.model_type}`, {spec.hidden_size} wide, patches of {spec.patch_size} px",
        ),
        ("language model", f"`{config.text_config.model_type}`, {config.text_config.hidden_size} wide"),
        ("image tokens from", f"`hidden_states` entry {config.vision_feature_layer}"),
    ]
    if isinstance(config, RegionLlavaConfig):
        rows += [
            (
                "image projector",
                f"`{config.projector}`, positions `{config.image_position}`, row ends {config.row_end}",
            ),
            ("input", f"{fields['image_size']} px, " + ("longest side" if config.row_end else "a letterboxed square")),
        ]
    elif regions:
        rows.append(("input", f"squares of {fields['image_size']} px: the whole picture, and tiles of it"))
    if regions:
        rows += [
            ("boxes in text", f"`{fields['box_format']}`"),
            (f"`{REGION_TOKEN}` becomes", f"`{fields['region_prompt']}`"),
        ]
    tags = ["llava", *(["region-features", "grounding"] if regions else [])]
    return write_card(folder, facts, config, text, "image-text-to-text", tags, rows, _usage(folder, facts, config))


def _usage(folder: Path, facts: CardFacts, config: Any) -> str:
    regions, trust = isinstance(config, RegionParts), ", trust_remote_code=True" if brings_code(folder) else ""
    needs_package = not trust and not native(config)
    question = f"{IMAGE_TOKEN}{REFER}" if regions else f"{IMAGE_TOKEN}What is in the picture?"
    box = ", boxes=[[box]]" if regions else ', return_tensors="pt"'
    lines = [
        *(["import regiontower.mllm  # makes the classes known to transformers"] if needs_package else []),
        "from PIL import Image",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        source_line(facts),
        f"model = AutoModelForImageTextToText.from_pretrained(source{trust}).eval()",
        f"processor = AutoProcessor.from_pretrained(source{trust})",
        'picture = Image.open("picture.jpg").convert("RGB")',
        f'messages = [{{"role": "user", "content": "{question}"}}]',
        "prompt = processor.apply_chat_template(messages, add_generation_prompt=True)",
    ]
    if regions:
        lines.append("box = [0, 0, picture.width / 2, picture.height / 2]  # x1, y1, x2, y2 in pixels of the picture")
    lines += [
        f"inputs = processor(images=[picture], text=[prompt]{box})",
        "ids = model.generate(**inputs, max_new_tokens=48)",
        'answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
        "print(answer)",
    ]
    if regions:
        lines.append("print(processor.parse_boxes(answer, processor.frame(picture.size)).boxes)  # boxes in the answer")
    return f"{needed(folder, config)}\n\n{code(lines)}"
