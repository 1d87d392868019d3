"""The models a demo talks through, and what may run on them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..mllm import RegionLlavaProcessor, load_mllm
from ..mllm.load import RegionMLLM
from ..vision_towers import UserError, describe_tower


@dataclass(frozen=True)
class DemoModel:
    """One opened model under the name that stands in the page's menu."""

    name: str
    model: RegionMLLM
    processor: RegionLlavaProcessor

    @property
    def config(self) -> Any:
        return self.model.config

    def summary(self) -> dict[str, Any]:
        """What it is made of, for the page and the HTTP API."""
        spec = describe_tower(self.config.vision)
        return {
            "name": self.name,
            "tower": self.config.vision.model_type,
            "region_readout": spec.region_readout,
            "image_size": self.processor.image_size,
            "language_model": self.config.text.model_type,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "box_format": self.processor.box_format,
            "region_prompt": self.processor.region_prompt,
        }


def load_models(sources: Sequence[str | Path], *, device: str = "auto", dtype: str = "auto") -> list[DemoModel]:
    """Open every model of a command line.

    Raises:
        UserError: none given, the same one twice, or one that cannot be opened.
    """
    if not sources:
        raise UserError("give the demo at least one model.")
    names = menu_names(sources)
    return [
        DemoModel(name, *load_mllm(source, device=device, dtype=dtype))
        for name, source in zip(names, sources, strict=True)
    ]


def menu_names(sources: Sequence[str | Path]) -> list[str]:
    """A short name for each: the last part of a path, with as many earlier parts as tell them apart.

    Paths of the machine are nobody's business, so no more of them is shown than that.
    """
    parts = [Path(source).parts for source in sources]
    if len(set(parts)) != len(parts):
        raise UserError("a model is named twice; give each once.")
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
