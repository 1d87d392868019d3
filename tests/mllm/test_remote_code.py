"""A RegionLlava that brings its code: the same answers where this package cannot be imported; and its card."""

import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

from regiontower.mllm import export_mllm_remote_code, load_mllm, to_plain_llava, write_mllm_card
from regiontower.mllm.answers import user_prompt
from regiontower.vision_towers import UserError

READER = """
import re, sys
from pathlib import Path
try:
    import regiontower
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported")
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, here = Path(sys.argv[1]), Path(sys.argv[2])
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
asked = torch.load(here / "asked.pt")
inputs = processor([Image.open(here / "picture.jpg").convert("RGB")], [asked["prompt"]], boxes=[asked["boxes"]])
with torch.no_grad():
    logits = model.eval()(**inputs).logits
ids = model.generate(**inputs, max_new_tokens=8, num_beams=3)
parsed = processor.parse_boxes("[0, 0, 500, 500]", processor.frame((120, 90)))
torch.save({"inputs": dict(inputs), "logits": logits, "ids": ids, "boxes": parsed.boxes.tensor()}, here / "found.pt")
block = re.search(r"```python\\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
exec(block.replace('source = "."', f"source = {str(folder)!r}"), {"__name__": "card"})
"""


def card_block(folder) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert found
    return found[1]


# What plain LLaVA cannot hold: this is what the file of code is for.
@pytest.mark.parametrize(
    ("language", "choices"), [("gemma3", {"projector": "merge2x2_mlp", "image_position": "sin2d", "row_end": True})]
)
def test_equal_answers_without_this_package(make_tiny_mllm, noise_image, tmp_path, language, choices):
    for part in make_tiny_mllm(language=language, **choices):
        part.save_pretrained(tmp_path / "saved")
    folder = export_mllm_remote_code(tmp_path / "saved", tmp_path / "exported")
    model, processor = load_mllm(tmp_path / "saved", device="cpu")
    noise_image().save(tmp_path / "picture.jpg", quality=95)
    asked = {"prompt": user_prompt(processor, "What is in <region>?"), "boxes": [[10.0, 20.0, 60.0, 80.0]]}
    torch.save(asked, tmp_path / "asked.pt")

    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "regiontower.py").write_text('raise ImportError("made unimportable for this run")\n')
    settings = {"PYTHONPATH": str(tmp_path / "without"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", READER, str(folder), str(tmp_path)],
        cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr

    found = torch.load(tmp_path / "found.pt")
    from PIL import Image

    inputs = processor([Image.open(tmp_path / "picture.jpg").convert("RGB")], [asked["prompt"]], boxes=[asked["boxes"]])
    assert found["inputs"].keys() == inputs.keys()
    assert all(torch.equal(found["inputs"][name], inputs[name]) for name in inputs)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(**inputs).logits)
    assert torch.equal(found["ids"], model.generate(**inputs, max_new_tokens=8, num_beams=3))
    parsed = processor.parse_boxes("[0, 0, 500, 500]", processor.frame((120, 90)))
    assert len(parsed.boxes) == 1 and torch.equal(found["boxes"], parsed.boxes.tensor())

    again, _ = load_mllm(folder, device="cpu")  # and with this package
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="is not empty"):
        export_mllm_remote_code(tmp_path / "saved", folder)


def test_card_of_a_run_folder_and_of_plain_llava(make_tiny_mllm, noise_image, tmp_path, monkeypatch):
    model, processor = make_tiny_mllm()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run")
    to_plain_llava(model, processor, tmp_path / "plain")
    for name, type_, tag in (("run", "region_llava", "grounding"), ("plain", "llava", "llava")):
        folder = tmp_path / name
        text = write_mllm_card(folder).read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-text-to-text"
        assert {"regiontower", type_, tag} <= set(front["tags"]) and "license" not in front
        assert "## Training" not in text and f"| type | `{type_}` |" in text
        monkeypatch.chdir(folder)
        noise_image().save("picture.jpg")
        exec(compile(card_block(folder), "README.md", "exec"), {"__name__": "__main__"})
    assert "trust_remote_code" not in (tmp_path / "run" / "README.md").read_text()
    assert "regiontower.mllm" not in card_block(tmp_path / "plain")
