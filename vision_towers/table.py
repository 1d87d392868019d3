"""The registered towers as a table."""

from dataclasses import asdict
from typing import Any

from transformers import CONFIG_MAPPING

from .describe import describe_tower, registered_towers
from .wrapped_model import WrappedVisionConfig


def tower_rows() -> list[dict[str, Any]]:
    """One row a registered type, described at its configuration's default sizes."""
    rows = []
    for model_type in sorted(registered_towers()):
        kind = CONFIG_MAPPING[model_type]
        config = kind(tower_config={}) if issubclass(kind, WrappedVisionConfig) else kind()
        spec = describe_tower(config)
        grid = spec.grid(spec.image_size, spec.image_size)
        rows.append({"type": model_type, "tokens": grid[0] * grid[1], **asdict(spec)})
    return rows


def tower_table() -> str:
    """The rows as text."""
    columns = {
        "type": "type",
        "hidden_size": "width",
        "patch_size": "patch",
        "image_size": "image px",
        "tokens": "tokens",
        "num_prefix_tokens": "prefix",
        "default_feature_layer": "layer",
        "positions": "positions",
        "any_resolution": "any H x W",
        "region_readout": "regions",
    }
    lines = [list(columns.values())]
    lines += [
        ["yes" if row[c] is True else "no" if row[c] is False else str(row[c]) for c in columns] for row in tower_rows()
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
