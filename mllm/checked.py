"""What `check` looks at: a LLaVA's configuration, its processor, and the adapter that lies with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..vision_towers import TowerSpec, UserError, describe_tower
from ..vision_towers.errors import CANNOT_OPEN, in_one_line
from ..vision_towers.packaged import model_source
from .adapters import adapter_base
from .follow_tower import FAMILIES
from .processing import RegionLlavaProcessor


@dataclass(frozen=True)
class Checked:
    """config: of the whole model. spec: of its tower. adapter: peft's configuration of a LoRA run; None without one."""

    config: Any
    spec: TowerSpec
    processor: Any
    adapter: Any

    @property
    def strategy(self) -> str:
        """`default` drops the first token of the tower, `full` keeps it."""
        return strategy_of(self.config)

    @property
    def pinpoints(self) -> list[list[int]]:
        """Height and width of what tiles are cut from; none for a model without tiles."""
        return [list(point) for point in getattr(self.config, "image_grid_pinpoints", None) or []]

    @cached_property
    def side(self) -> int | None:
        """Pixels of the square that the tower gets; None where the processor decides by the picture."""
        if isinstance(self.processor, RegionLlavaProcessor):
            return None if self.processor.row_end else self.processor.image_size
        images = self.processor.image_processor
        size = getattr(images, "crop_size", None) or images.size
        found = {size[key] for key in ("height", "width", "shortest_edge") if size and key in size}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def model(self) -> Any:
        """Without weights."""
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.config).eval()


def look_at(name_or_path: str | Path) -> Checked:
    """Open what `check_model` takes. Weights are not read.

    Raises:
        UserError: nothing to open there, or no LLaVA with its processor.
    """
    source = whole = model_source(name_or_path)
    while (base := adapter_base(whole)) is not None:
        whole = model_source(base.path)
    try:
        config: Any = AutoConfig.from_pretrained(whole)
        if not hasattr(config, "vision_config") or not strategy_of(config):
            raise UserError(f"{source!r} is a {config.model_type}; only LLaVA-style models can be checked.")
        processor: Any = AutoProcessor.from_pretrained(source)
    except UserError:
        raise
    except CANNOT_OPEN as error:
        raise UserError(f"no model can be opened at {source!r}: {in_one_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{source!r} has a tokenizer and no processor; add preprocessor_config.json of its model.")
    return Checked(
        config, describe_tower(config.vision_config), processor, _adapter(source) if whole != source else None
    )


def strategy_of(config: Any) -> str:
    """What a LLaVA does with its tower's first token; nothing for another model."""
    family = FAMILIES.get(config.model_type)
    always = "default" if family is not None and family.drops_first else ""
    return always or getattr(config, "vision_feature_select_strategy", "")


def _adapter(source: str) -> Any:
    from peft import LoraConfig

    return LoraConfig.from_pretrained(source)
