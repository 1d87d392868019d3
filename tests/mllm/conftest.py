"""The tests of this folder run on both kinds of language model."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session", params=["llama", "gemma3"])
def tiny_mllm(request, make_tiny_mllm):
    """One such model, shared: do not change it."""
    return make_tiny_mllm(language=request.param)


@pytest.fixture(scope="session")
def tiny_mllm_dir(tiny_mllm, tmp_path_factory) -> Path:
    """That model as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny_mllm")
    for part in tiny_mllm:
        part.save_pretrained(folder)
    return folder
