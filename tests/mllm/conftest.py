"""The tests of this folder run on both kinds of language model; towers and a Llava in files, for those of swaps."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `box_examples` and others, for the tests that share them


@pytest.fixture(scope="session", params=["llama", "gemma3"])
def tiny_mllm(request, make_tiny_mllm):
    """One such model, shared: do not change it."""
    return make_tiny_mllm(language=request.param)


@pytest.fixture(scope="session")
def tiny_mllm_dir(tiny_mllm, tmp_path_factory):
    """That model as `save_pretrained` writes it. Its own fixture: one for all folders would keep the first model."""
    folder = tmp_path_factory.mktemp("tiny_mllm")
    for part in tiny_mllm:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, Path]:
    """Saved towers by name."""
    from regiontower.benchmarks._tiny_llavas import tiny_tower

    folders = {name: tmp_path_factory.mktemp(name.lower()) for name in ("RICE", "CLIP", "SigLIP", "DINOv3")}
    for name, folder in folders.items():
        tiny_tower(name).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A bf16 Llava in the hub's layout, in three files."""
    import torch

    from regiontower.benchmarks._tiny_llavas import save_as, tiny_llava

    return save_as(*tiny_llava("Llava", torch.bfloat16), tmp_path_factory.mktemp("llava"), "v4", shards=3)
