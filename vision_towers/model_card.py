"""README.md of a saved model: what stands in its folder, how to open it, and what its training wrote down.

A card says nothing that was not read from a file. What no file knows (a licence, the hub id the weights came from) is
given by the caller or left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig

from .describe import TowerSpec, describe_tower
from .errors import UserError

CARD_FILE = "README.md"
STAGE_FILE = "stage.json"  # written by a training run into its folder
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class CardFacts:
    """What a card cannot read off the folder it stands in.

    Args:
        repo_id: hub id that the usage code opens; the folder itself when absent.
        license: identifier of the hub, such as "apache-2.0"; left out when absent.
        base_model: hub id of the weights that were exported.
        run: folder of the training run; the folder itself when absent.
    """

    repo_id: str | None = None
    license: str | None = None
    base_model: str | None = None
    run: Path | None = None


def write_tower_card(folder: str | Path, facts: CardFacts | None = None) -> Path:
    """README.md for a saved tower: ours, native or exported with its code; also for a whole `cloc` or `umg_clip`.

    Raises:
        UserError: no model stands in the folder, or one that is no registered tower.
    """
    folder, facts = Path(folder), facts or CardFacts()
    config = read_config(folder)
    vision = getattr(config, "vision_config", None) or config
    spec = describe_tower(vision)
    kind = "A region-aware vision tower" if spec.region_dim else "A vision tower"
    if vision is not config:
        kind += " and a text tower"
    text = f"{kind}: pixels become image tokens" + (", boxes become one embedding each." if spec.region_dim else ".")
    tags = ["vision-encoder", *(["region-features"] if spec.region_dim else [])]
    rows = [("type", f"`{config.model_type}`"), *weight_rows(folder), *spec_rows(spec)]
    usage = _tower_usage(folder, facts, config, spec, pair=vision is not config)
    return write_card(folder, facts, config, text, "image-feature-extraction", tags, rows, usage)


def write_card(
    folder: Path,
    facts: CardFacts,
    config: PreTrainedConfig,
    text: str,
    pipeline_tag: str,
    tags: Sequence[str],
    rows: Rows,
    usage: str,
) -> Path:
    """Put the parts together. `text` says what the model is, `usage` is Markdown, `rows` those of a table."""
    stage = read_stage(facts.run or folder)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline_tag}
    if facts.license:
        front["license"] = facts.license
    if bases := _base_models(facts, stage):
        front["base_model"] = bases[0] if len(bases) == 1 else bases
    front["tags"] = ["regiontower", *tags, config.model_type, *(["custom_code"] if brings_code(folder) else [])]
    name = facts.repo_id.rpartition("/")[2] if facts.repo_id else (config.architectures or [config.model_type])[0]
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {name}", text, table(rows), "## Use", usage]
    if stage:
        parts += ["## Training", *_training(stage)]
    path = folder / CARD_FILE
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a folder.

    Raises:
        UserError: there is none that can be read.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"no model stands in {folder}: {str(error).splitlines()[0]}") from error


def read_stage(folder: Path) -> dict[str, Any] | None:
    """What a training run wrote down about itself, or None.

    Raises:
        UserError: the file is not JSON.
    """
    path = folder / STAGE_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it or remove it.") from None


def brings_code(folder: Path) -> bool:
    """Whether a model's own code stands beside it. The entry in the configuration alone outlives the file: transformers
    keeps it when it saves again."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    modules = {reference.partition(".")[0] for reference in fields.get("auto_map", {}).values()}
    return bool(modules) and all((folder / f"{module}.py").is_file() for module in modules)


def native(config: PreTrainedConfig) -> bool:
    """Whether transformers knows the model without us."""
    return type(config).__module__.startswith("transformers.")


def needed(folder: Path, config: PreTrainedConfig) -> str:
    """A sentence: what has to be installed to open the folder."""
    if brings_code(folder):
        return "The classes stand beside the weights in one Python file: read it before you trust it."
    if native(config):
        return "transformers has this model's class; nothing else is needed."
    return "The classes come with the Python package `regiontower`."


def weight_rows(folder: Path) -> Rows:
    """Number and types of the parameters in the model's safetensors files."""
    count, kinds = 0, set()
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                piece = file.get_slice(name)
                size = 1
                for side in piece.get_shape():
                    size *= side
                count, kinds = count + size, kinds | {piece.get_dtype()}
    return [("parameters", f"{count:,} ({', '.join(sorted(kinds))})")] if count else []


def spec_rows(spec: TowerSpec) -> Rows:
    """The facts that whoever uses the tower has to agree with."""
    sides = "any multiples of the patch, made for" if spec.any_resolution else ""
    regions = [("region embedding", f"{spec.region_dim} wide, read by `{spec.region_readout}`")]
    return [
        ("image token", f"{spec.hidden_size} wide"),
        *(regions if spec.region_dim else []),
        ("input", f"{sides} {spec.image_size} x {spec.image_size} px, patches of {spec.patch_size} px".strip()),
        ("tokens before the patches", str(spec.num_prefix_tokens)),
        ("positions", spec.positions),
        ("`hidden_states` entry for a language model", str(spec.default_feature_layer)),
        ("mean, standard deviation", f"{_numbers(spec.image_mean)}; {_numbers(spec.image_std)}"),
    ]


def table(rows: Rows) -> str:
    """Two columns of Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def code(lines: Sequence[str]) -> str:
    """A block of Python."""
    return "\n".join(["```python", *lines, "```"])


def source_line(facts: CardFacts) -> str:
    """The line of the usage code that says what is opened."""
    where = facts.repo_id or "."
    return f'source = "{where}"' + ("" if facts.repo_id else "  # this folder")


def _tower_usage(folder: Path, facts: CardFacts, config: PreTrainedConfig, spec: TowerSpec, pair: bool) -> str:
    trust = ", trust_remote_code=True" if brings_code(folder) else ""
    needs_package = not trust and not native(config)
    side, call = spec.image_size, "model.vision_tower" if pair else "model"
    lines = [
        *(["import regiontower.vision_towers  # makes the class known to transformers"] if needs_package else []),
        "import torch",
        "from PIL import Image",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        source_line(facts),
        f"model = AutoModel.from_pretrained(source{trust}).eval()",
        "processor = AutoImageProcessor.from_pretrained(source)",
        'picture = Image.open("picture.jpg").convert("RGB")',
        f'pixels = processor(picture, return_tensors="pt")["pixel_values"]  # squeezed to {side} x {side} px',
    ]
    if spec.region_dim:
        lines += [
            "# (images, boxes, 4): x1, y1, x2, y2 in pixels of the squeezed picture, float32.",
            f"boxes = torch.tensor([[[0.0, 0.0, {side / 2}, {side / 2}]]])",
            "with torch.no_grad():",
            f"    output = {call}(pixels, boxes=boxes)",
            "print(output.last_hidden_state.shape, output.region_embeds.shape)",
        ]
        if pair:
            lines += ["with torch.no_grad():", "    print(model.encode_regions(pixels, boxes).shape)  # with the texts"]
    else:
        lines += [
            "with torch.no_grad():",
            f"    output = {call}(pixels)",
            "print(output.last_hidden_state.shape)",
        ]
    return f"{needed(folder, config)}\n\n{code(lines)}"


def _base_models(facts: CardFacts, stage: Mapping[str, Any] | None) -> list[str]:
    """Hub ids: of what was exported, and of what a run began with (a parent without a hash was no folder)."""
    parents = (stage or {}).get("parents", {}).values()
    ids = [record["path"] for record in parents if record["weights_sha256"] is None]
    found = [facts.base_model, *(name for name in ids if HUB_ID.fullmatch(name))]
    return list(dict.fromkeys(name for name in found if name))


def _training(stage: Mapping[str, Any]) -> list[str]:
    """What a run wrote down; of the paths in it only last names."""
    rows = [("stage", f"{stage['stage']}, {stage['status']}")]
    for name in ("steps", "samples", "seconds", "final_loss"):
        if stage.get(name) is not None:
            rows.append((name.replace("_", " "), _value(stage[name])))
    if best := stage.get("best_loss"):
        rows.append(("best loss", f"{_value(best['loss'])} at step {best['step']}"))
    rows += [(f"`{name}`", _value(value)) for name, value in stage.get("metrics", {}).items()]
    rows += [(f"data: {name}", f"sha256 `{digest}`") for name, digest in stage.get("data", {}).items()]
    for role, record in stage.get("parents", {}).items():
        rows.append((f"began with: {role}", _parent(record)))
    for title in ("versions", "machine"):
        if known := stage.get(title):
            rows.append((title, ", ".join(f"{name} {value}" for name, value in known.items())))
    return ["These figures are the run's own (`stage.json`); they are no benchmark.", table(rows)]


def _parent(record: Mapping[str, Any]) -> str:
    path, digest, before = record["path"], record["weights_sha256"], record.get("stage")
    name = path if digest is None and HUB_ID.fullmatch(path) else re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    text = f"`{name}`" + (f", weights sha256 `{digest}`" if digest else "")
    return f"{text}, after {before['stage']} of {before['steps']} steps" if before else text


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
