"""Towers for use without this package: with their classes beside them in one Python file, or as native ViTs."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from .bundle import PACKAGE, bundle
from .cloc_model import ClocModel
from .describe import describe_tower, register_tower
from .errors import UserError
from .image_processor import tower_image_processor
from .load import load_cloc, load_tower, load_umg_clip
from .model_card import CardFacts, write_tower_card
from .packaged import model_source
from .register import describe_rice, describe_wrapped
from .umg_clip_model import UmgClipModel

HEAD = '''"""{model}, written by regiontower from its own modules.

Needs transformers, torch, torchvision and Pillow; not regiontower. Apache License 2.0.
"""
'''


def export_remote_code(
    source: str | Path, out: str | Path, *, repo_id: str | None = None, license: str | None = None
) -> Path:
    """Write a tower so that `AutoModel.from_pretrained(out, trust_remote_code=True)` opens it without this package,
    with its regions and with equal outputs.

    A whole `cloc` or `umg_clip` is written whole. Anything else is opened by `load_tower`: a native ViT gets a readout,
    and of a LLaVA the tower is taken.

    Args:
        source: a packaged name, hub id or folder. out: a new or empty folder.
        repo_id: hub id that the card names. license: of the weights, as the hub writes it.
    Returns:
        `out`, with config.json, safetensors, preprocessor_config.json, `modeling_<type>.py` and README.md.
    Raises:
        UserError: nothing to open there, `out` holds files, or code that cannot be written as one file.
    """
    out = new_folder(out)
    model = _open(source)
    config: Any = model.config
    pair = isinstance(model, ClocModel | UmgClipModel)
    auto = {"AutoConfig": type(config), "AutoModel": type(model)}
    tower = config.vision_config if pair else config
    text = write_code(type(model).__name__, describing(tower), registering(auto))
    model.save_pretrained(out, save_original_format=False)
    add_code(out, f"modeling_{config.model_type}", text, {"config.json": auto})
    tower_image_processor(tower).save_pretrained(out)
    if pair and cached_file(model_source(source), "tokenizer_config.json", _raise_exceptions_for_missing_entries=False):
        AutoTokenizer.from_pretrained(model_source(source)).save_pretrained(out)
    write_tower_card(out, card_facts(source, repo_id, license))
    return out


def export_native(
    source: str | Path, out: str | Path, *, repo_id: str | None = None, license: str | None = None
) -> Path:
    """Write the ViT inside a tower as transformers knows it. Image tokens are the same; regions are left behind, except
    that a RICE has no parameters of its own and is a RICE again when `load_tower` opens the folder.

    Args as of `export_remote_code`.

    Raises:
        UserError: nothing to open there, or `out` holds files.
    """
    out = new_folder(out)
    tower: Any = load_tower(source)
    native = tower.to_native()
    native.save_pretrained(out)
    tower_image_processor(native.config).save_pretrained(out)
    write_tower_card(out, card_facts(source, repo_id, license))
    return out


def new_folder(out: str | Path) -> Path:
    """The folder to write into.

    Raises:
        UserError: files stand there. They would pass for parts of the model, and be uploaded with it.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give a new folder to write the model into.")
    return out


def card_facts(source: str | Path, repo_id: str | None, license: str | None) -> CardFacts:
    """What the card of an export can know: a source that is no folder here is a hub id, any other may be a run."""
    folder = Path(model_source(source))
    base = None if folder.is_dir() else str(source)
    return CardFacts(repo_id, license, base, folder if folder.is_dir() else None)


def describing(tower: PreTrainedConfig) -> str:
    """Source of the statements that make `describe_tower` know this tower's type."""
    readout = describe_tower(tower).region_readout
    function, arguments = (describe_rice, "") if readout == "rice" else (describe_wrapped, f"({readout!r})")
    call = f"register_tower({tower.model_type!r}, {function.__name__}{arguments})"
    return "\n".join([*map(_import, (register_tower, function)), call])


def registering(auto: dict[str, type]) -> str:
    """Source of the statements that make a model known to transformers; `auto` holds the class that each of its Auto
    classes opens."""
    config = auto["AutoConfig"].__name__
    return "\n".join(
        [
            f"from transformers import {', '.join(auto)}",
            *map(_import, auto.values()),
            f"AutoConfig.register({config}.model_type, {config}, exist_ok=True)",
            *(f"{n}.register({config}, {c.__name__}, exist_ok=True)" for n, c in auto.items() if n != "AutoConfig"),
        ]
    )


def _import(thing: Any) -> str:
    if thing.__module__.partition(".")[0] != PACKAGE:
        raise UserError(
            f"{thing.__name__} is of {thing.__module__} and not of this package, so its code cannot be put into the "
            "file; publish it with a file of its own."
        )
    return f"from {thing.__module__} import {thing.__name__}"


def write_code(model: str, *statements: str) -> str:
    """One file that holds what the statements import, and runs them. `model`: what the file is of."""
    return bundle("\n".join([HEAD.format(model=model), *statements]))


def add_code(out: Path, module: str, text: str, auto_maps: dict[str, dict[str, type]]) -> None:
    """Put the file beside a saved model and name its classes in the JSON files that transformers reads.

    Args:
        module: the file's name without `.py`. auto_maps: JSON file -> Auto class -> class in the file.
    """
    (out / f"{module}.py").write_text(text, encoding="utf-8")
    for name, auto in auto_maps.items():
        fields = json.loads((out / name).read_text(encoding="utf-8"))
        fields["auto_map"] = {key: f"{module}.{kind.__name__}" for key, kind in auto.items()}
        (out / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_type(source: str | Path) -> str:
    """The `model_type` in the config.json of a packaged model, folder or hub id.

    Raises:
        UserError: nothing to open there.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(model_source(source))
    except (OSError, ValueError) as error:
        raise UserError(f"no model can be opened at {str(source)!r}: {str(error).splitlines()[0]}") from error
    return fields.get("model_type", "")


def _open(source: str | Path) -> PreTrainedModel:
    return {"cloc": load_cloc, "umg_clip": load_umg_clip}.get(model_type(source), load_tower)(source)
