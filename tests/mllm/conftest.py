"""The tests of this folder run on both kinds of language model."""

import pytest


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
