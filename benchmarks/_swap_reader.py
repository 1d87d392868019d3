"""Open every swapped checkpoint of a folder and compare. Run as a script it cannot import this package.

argv: the folder; writes `plain.json` there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def read_all(root: Path) -> dict[str, dict[str, Any]]:
    """Checkpoint -> wrong keys, largest difference of logits and whether ids are equal, or the error of opening it."""
    return {folder.name: _read(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}


def _read(folder: Path) -> dict[str, Any]:
    opener: Any = AutoModelForImageTextToText
    try:
        model, info = opener.from_pretrained(folder / "out", dtype="auto", output_loading_info=True)
    except ValueError as error:
        return {"error": str(error).splitlines()[0]}
    AutoProcessor.from_pretrained(folder / "out")
    expected = torch.load(folder / "expected.pt")
    model.eval()
    with torch.no_grad():
        logits = model(**expected["inputs"]).logits
        ids = model.generate(**expected["inputs"], max_new_tokens=expected["new_tokens"], do_sample=False)
    return {
        "keys": sum(len(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")),
        "difference": (logits.float() - expected["logits"].float()).abs().max().item(),
        "ids": torch.equal(ids, expected["ids"]),
    }


if __name__ == "__main__":
    blocked: Any = None
    sys.modules["regiontower"] = blocked  # importing it raises ImportError
    place = Path(sys.argv[1])
    (place / "plain.json").write_text(json.dumps(read_all(place)))
