"""to_plain_llava: a checkpoint that opens where this package cannot be imported."""

import subprocess
import sys

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from regiontower.mllm import to_plain_llava
from regiontower.mllm.answers import user_prompt
from regiontower.vision_towers import UserError

READER = """
import sys
sys.modules["regiontower"] = None  # importing it raises ImportError
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert type(model).__name__ == "LlavaForConditionalGeneration", type(model)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
with torch.no_grad():
    torch.save(model.eval()(**torch.load(folder + "/inputs.pt")).logits, folder + "/logits.pt")
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(images=Image.new("RGB", (120, 90)), text="<image>none", return_tensors="pt")
model(**inputs)  # token count and feature count agree
"""


def test_reloads_without_this_package_with_the_same_logits(tiny_mllm, noise_image, tmp_path):
    model, processor = tiny_mllm
    to_plain_llava(model, processor, tmp_path)
    inputs = processor([noise_image()], [user_prompt(processor, "Where is the star?")])
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    run = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(**inputs).logits)


def test_no_second_language_model_is_made(tiny_mllm, tmp_path, monkeypatch):
    model, processor = tiny_mllm
    written = []
    monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", lambda self, _: written.append(self))
    to_plain_llava(model, processor, tmp_path)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in written[0].state_dict().values()} <= own


@pytest.mark.parametrize(
    "choices", [{"projector": "merge2x2_mlp"}, {"image_position": "sin2d"}, {"row_end": True}], ids=str
)
def test_what_plain_llava_cannot_run_is_refused_in_one_line(make_tiny_mllm, tmp_path, choices):
    with pytest.raises(UserError, match="plain LLaVA cannot run this model") as error:
        to_plain_llava(*make_tiny_mllm(**choices), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
