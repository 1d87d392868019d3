"""Open the Hugging Face models that engines use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor
from transformers.utils import logging

from ...vision_towers.packaged import model_source
from .labeller import Workplace, no_model


def open_model(auto_class: Any, name_or_path: str, workplace: Workplace) -> Any:
    """A model for inference, from safetensors; on the workplace's device, in its dtype (as saved when it has none).

    Raises:
        UserError: no such model there, or not one of that kind.
    """
    source = model_source(name_or_path)
    bars = logging.is_progress_bar_enabled()
    if Path(source).is_dir():  # a download may take minutes and keeps its bar
        logging.disable_progress_bar()
    try:
        model = auto_class.from_pretrained(source, dtype=workplace.dtype or "auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise no_model(name_or_path, error) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if workplace.dtype is not None and not model._keep_in_fp32_modules:
        model = model.to(workplace.dtype)  # a part whose own config names another dtype keeps that one (SAM 3's ViT)
    return model.to(workplace.device).eval()


def open_processor(name_or_path: str, processor_class: Any = AutoProcessor) -> Any:
    """A model's processor.

    Raises:
        UserError: there is none.
    """
    try:
        return processor_class.from_pretrained(model_source(name_or_path))
    except (OSError, ValueError) as error:
        raise no_model(name_or_path, error) from error
