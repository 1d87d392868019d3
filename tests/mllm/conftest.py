"""The tests of this folder run on both kinds of language model."""

import pytest


@pytest.fixture(scope="session", params=["llama", "gemma3"])
def tiny_mllm(request, make_tiny_mllm):
    """One such model, shared: do not change it."""
    return make_tiny_mllm(language=request.param)
