"""Two ranks that see different kinds of batch: with regions, without, without any picture."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regiontower.mllm import RegionLlavaForConditionalGeneration

RANK = Path(__file__).with_name("ddp_rank.py")
batch = runpy.run_path(str(RANK))["batch"]


@pytest.mark.parametrize("tiny_mllm", ["gemma3"], indirect=True)  # one kind of language model is enough here
@pytest.mark.parametrize(
    "kinds", [("regions", "image"), ("image", "regions"), ("regions", "text")], ids=lambda kinds: "-".join(kinds)
)
def test_ddp_does_not_hang_and_equals_one_process(tiny_mllm, tiny_mllm_dir, tmp_path, kinds):
    (tmp_path / "model").symlink_to(tiny_mllm_dir)
    ranks = [
        subprocess.Popen([sys.executable, RANK, str(rank), tmp_path, *kinds], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=200)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    found = torch.load(tmp_path / "grads.pt")
    model = RegionLlavaForConditionalGeneration.from_pretrained(tiny_mllm_dir).train()
    for rank, kind in enumerate(kinds):
        for step in range(2):
            (model(**batch(tiny_mllm[1], kind, 10 * rank + step)).loss / 2).backward()
    for name, parameter in model.named_parameters():
        assert found[name] is not None, name
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-4)
