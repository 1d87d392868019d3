"""Proof that a swapped checkpoint is the swapped model: opened by another process, it gives the same logits and ids."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from ..vision_towers import UserError
from .answers import model_inputs, user_prompt
from .processing import RegionLlavaProcessor
from .prompts import REFER

NEW_TOKENS = 8
SHARE_OF_MEMORY = 0.4  # of what is free; above it a model is not opened without being asked to

# Run by a fresh interpreter. argv: the checkpoint, a folder with inputs, and whether this package may be imported.
READER = """
import json, sys
from pathlib import Path

folder, given, ours = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "ours"
if ours:
    import regiontower.mllm
else:
    sys.modules["regiontower"] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(json.loads((given / "threads.json").read_text()))
model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
model.eval()
inputs = torch.load(given / "inputs.pt")
words = inputs.pop("new_tokens")
AutoProcessor.from_pretrained(folder)
with torch.no_grad():
    logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=words, do_sample=False)
torch.save({"logits": logits, "ids": ids}, given / "found.pt")
keys = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
(given / "keys.json").write_text(json.dumps(keys))
"""


def fits_in_memory(folder: Path) -> bool:
    """Whether the weights in a folder are under 40 % of the free memory."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return size < SHARE_OF_MEMORY * psutil.virtual_memory().available


def probe_inputs(processor: Any, model: Any) -> dict[str, Any]:
    """A question about a picture, ready for the model, with a box when it takes one."""
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij")
    pixels = torch.stack([rows * 2, columns * 2, (rows * columns) % 256], dim=-1).to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    if isinstance(processor, RegionLlavaProcessor):
        inputs = processor([picture], [user_prompt(processor, REFER)], boxes=[[(8, 8, 70, 60)]])
        return model_inputs(model, inputs)
    text = f"{processor.image_token}\nWhat is in the picture?"
    return dict(processor(images=[picture], text=[text], return_tensors="pt").to(model.dtype))


@torch.no_grad()
def answers_of(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Logits of a prompt and the ids of a greedy answer."""
    model.eval()
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"logits": model(**inputs).logits, "ids": ids}


def answers_elsewhere(
    folder: Path, ours: bool, inputs: dict[str, Any]
) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    """Open a checkpoint in a fresh process and ask it.

    Args:
        ours: the process may import this package. inputs: as `probe_inputs`.
    Returns:
        (missing, unexpected and mismatched keys of the load, answers as of `answers_of`).
    Raises:
        UserError: the checkpoint cannot be opened there.
    """
    with tempfile.TemporaryDirectory() as name:
        given = Path(name)
        torch.save({**inputs, "new_tokens": NEW_TOKENS}, given / "inputs.pt")
        (given / "threads.json").write_text(str(torch.get_num_threads()))
        command = [sys.executable, "-c", READER, str(folder), str(given), "ours" if ours else "plain"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the swapped model in {folder} cannot be opened by a fresh process: {last}")
        return json.loads((given / "keys.json").read_text()), torch.load(given / "found.pt")


def difference(keys: dict[str, list[str]], found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """What a reloaded model does otherwise, in one phrase; nothing when it is the same, up to `rounding`."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys[kind]:
            return f"{len(keys[kind])} {kind.replace('_', ' ')}, e.g. {keys[kind][0]}"
    if gap(found, expected) > rounding(expected):
        return f"logits by {gap(found, expected):.2g}"
    return "" if torch.equal(found["ids"], expected["ids"]) else "the ids of the answer"


def gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference between two answers' logits; infinite where they are of different shapes or not finite."""
    one, other = found["logits"].float(), expected["logits"].float()
    if one.shape != other.shape or not (one.isfinite().all() and other.isfinite().all()):
        return 0.0 if torch.equal(one, other) else math.inf
    return (one - other).abs().max().item()


def rounding(expected: dict[str, torch.Tensor]) -> float:
    """How far logits of the same weights may lie apart: on some processors the last bits of a matrix product depend on
    where in memory the weights are."""
    logits = expected["logits"]
    share = 1e-5 if logits.dtype == torch.float32 else 4 * torch.finfo(logits.dtype).eps
    return share * logits.float().abs().max().item()
