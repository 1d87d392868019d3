"""Fixtures for the tests of the training stages."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `small_runs` and others, for the tests that share them


@pytest.fixture
def processor(tiny_mllm):
    """The one of `tiny_mllm`."""
    return tiny_mllm[1]


@pytest.fixture(scope="session")
def tiny_parents(tiny_mllm, tmp_path_factory) -> Path:
    """A folder with the parts of `tiny_mllm` as stages 0 and 0b leave them, `tower` and `lm`: do not write there."""
    from transformers import AutoModelForCausalLM

    model, processor = tiny_mllm
    folder = tmp_path_factory.mktemp("parents")
    model.model.vision_tower.save_pretrained(folder / "tower")
    language_model = AutoModelForCausalLM.from_config(model.config.text_config)
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    language_model.tie_weights()
    language_model.generation_config.eos_token_id = model.generation_config.eos_token_id
    language_model.save_pretrained(folder / "lm")
    processor.tokenizer.save_pretrained(folder / "lm")
    return folder
