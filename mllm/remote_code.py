"""A whole RegionLlava as a checkpoint that brings its own classes."""

from pathlib import Path

from ..vision_towers.remote_code import add_code, card_facts, describing, new_folder, registering, write_code
from .load import load_mllm
from .model_card import write_mllm_card


def export_mllm_remote_code(
    source: str | Path, out: str | Path, *, repo_id: str | None = None, license: str | None = None
) -> Path:
    """Write a RegionLlava so that `AutoModelForImageTextToText` and `AutoProcessor` open it without this package, with
    `trust_remote_code=True`: boxes, regions and equal outputs.

    Args:
        source: a packaged name, run directory, folder or hub id. out: a new or empty folder.
        repo_id: hub id that the card names. license: of the weights, as the hub writes it.
    Returns:
        `out`, with the model, its processor, `modeling_region_llava.py` and README.md.
    Raises:
        UserError: nothing to open there, or `out` holds files.
    """
    out = new_folder(out)
    model, processor = load_mllm(source, device="cpu")
    tower = model.model.vision_tower
    parts = {"AutoConfig": type(tower.config), "AutoModel": type(tower)}
    whole = {
        "AutoConfig": type(model.config),
        "AutoModelForImageTextToText": type(model),
        "AutoProcessor": type(processor),
    }
    text = write_code(type(model).__name__, describing(tower.config), registering(parts), registering(whole))
    # The names that the weights have in memory: transformers knows LLaVA's other names only for its own classes.
    model.save_pretrained(out, save_original_format=False)
    processor.save_pretrained(out)
    maps = {"config.json": whole, "processor_config.json": whole}
    add_code(out, f"modeling_{model.config.model_type}", text, maps)
    write_mllm_card(out, card_facts(source, repo_id, license))
    return out
