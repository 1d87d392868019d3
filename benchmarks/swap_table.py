"""The table of docs/swap.md: every kind of LLaVA on every tower, on tiny random checkpoints with true tensor names.

regiontower bench swap-table [--kinds Llava,LlavaNext] [--towers 'CLIP;RICE'] --json

Each pair is swapped from files in both key layouts and in float32 and bfloat16, then opened by a fresh process that
cannot import this package, and where that cannot be, by this one. A row says the worst of its four checkpoints.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from regiontower.benchmarks._swap_reader import read_all
from regiontower.benchmarks._tiny_llavas import TOWERS, save_as, tiny_llava, tiny_tower
from regiontower.mllm import swap_checkpoint, swap_vision_tower
from regiontower.mllm.checkpoint import memory_name
from regiontower.mllm.swap_proof import NEW_TOKENS, answers_of, probe_inputs
from regiontower.vision_towers import describe_tower, load_tower

KINDS = ("Llava", "LlavaNext", "LlavaOnevision")
LAYOUTS, DTYPES = ("v4", "v5"), (torch.float32, torch.bfloat16)
HEAD = (
    "model",
    "tower",
    "image tokens",
    "reload difference",
    "greedy ids",
    "LLM tensors",
    "opens in plain transformers",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma separated")
    parser.add_argument("--towers", help="separated by semicolons; all of them by default")
    parser.add_argument("--json", action="store_true", help="the rows alone on the last line")
    arguments = parser.parse_args()
    towers = arguments.towers.split(";") if arguments.towers else list(TOWERS)
    unknown = {*arguments.kinds.split(",")} - {*KINDS} | {*towers} - {*TOWERS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rows = swap_rows(arguments.kinds.split(","), towers)
    print(json.dumps({"rows": rows}) if arguments.json else as_markdown(rows))


def swap_rows(kinds: Sequence[str], towers: Sequence[str]) -> list[dict[str, Any]]:
    """One row a pair, with the worst over layouts and dtypes."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cells = {
            (kind, tower): [_swap(root, kind, tower, layout, dtype) for layout in LAYOUTS for dtype in DTYPES]
            for kind in kinds
            for tower in towers
        }
        reader = Path(__file__).with_name("_swap_reader.py")
        subprocess.run([sys.executable, "-P", str(reader), name], check=True, capture_output=True)
        plain, ours = json.loads((root / "plain.json").read_text()), read_all(root)
    return [_row(kind, tower, cells[kind, tower], plain, ours) for kind, tower in cells]


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as the table in the documentation."""
    lines = [HEAD, ["---"] * len(HEAD)]
    lines += [
        (
            row["model"],
            row["tower"],
            str(row["image_tokens"]),
            f"{row['difference']:g}",
            "equal" if row["ids_equal"] else "DIFFER",
            "equal to the bit" if row["language_equal"] else "DIFFER",
            row["plain"],
        )
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _swap(root: Path, kind: str, tower: str, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """Write one checkpoint and its tower, swap on disk, and put down what the swap in memory answers."""
    name = f"{kind} {tower} {layout} {str(dtype).rpartition('.')[2]}"
    folder = root / name
    source = save_as(*tiny_llava(kind, dtype), folder / "source", layout, shards=2)
    tiny_tower(tower).save_pretrained(folder / "tower")
    report = swap_checkpoint(source, folder / "tower", folder / "out", verify="bytes")

    plain = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    model, processor = swap_vision_tower(plain, AutoProcessor.from_pretrained(source), load_tower(folder / "tower"))
    inputs = probe_inputs(processor, model)
    torch.save(answers_of(model, inputs) | {"inputs": inputs, "new_tokens": NEW_TOKENS}, folder / "expected.pt")
    before, after = _language(source), _language(folder / "out")
    equal = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    registers = describe_tower(load_tower(folder / "tower").to_native().config).num_prefix_tokens - 1
    return {
        "name": name,
        "language_equal": equal,
        "native": report["opens_in_plain_transformers"],
        "image_tokens": tokens,
        "registers": registers,
    }


def _language(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {memory_name(name): tensor for name, tensor in load_file(file).items()}
    return {k: v for k, v in found.items() if not k.startswith(("model.vision_tower.", "model.multi_modal_projector."))}


def _row(kind: str, tower: str, cells: list[dict[str, Any]], plain: dict, ours: dict) -> dict[str, Any]:
    opened = [plain[cell["name"]] for cell in cells]
    native = all("error" not in found for found in opened)
    if any(cell["native"] != native for cell in cells):
        raise RuntimeError(f"{kind} on {tower}: the report says native={cells[0]['native']}, a fresh process: {opened}")
    results = opened if native else [ours[cell["name"]] for cell in cells]
    if any(result["keys"] for result in results):
        raise RuntimeError(f"{kind} on {tower}: keys are missing or unexpected: {results}")
    why = f"no: our class leaves out its {cells[0]['registers']} register tokens; import regiontower.mllm first"
    return {
        "model": kind,
        "tower": tower,
        "image_tokens": cells[0]["image_tokens"],
        "difference": max(result["difference"] for result in results),
        "ids_equal": all(result["ids"] for result in results),
        "language_equal": all(cell["language_equal"] for cell in cells),
        "opens_plain": native,
        "plain": "yes" if native else why,
    }


if __name__ == "__main__":
    main()
