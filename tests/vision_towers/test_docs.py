"""The runnable blocks of docs/towers.md run as printed, and its table is what the code says."""

import re
from pathlib import Path

import pytest

from regiontower.vision_towers import describe_tower, registered_towers
from regiontower.vision_towers.table import tower_rows, tower_table

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "towers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
ROWS = dict(re.findall(r"^\| `(\w+)`(?: \(.*?\))? \| (.*) \|$", PAGE, flags=re.M))


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(block):
    exec(compile(block, "docs/towers.md", "exec"), {"__name__": "__main__"})


def test_the_page_and_the_command_name_every_tower(native):
    assert sorted(registered_towers()) == [row["type"] for row in tower_rows()]
    assert all(model_type in ROWS and model_type in tower_table() for model_type in registered_towers())
    for name in ("clip", "siglip", "mlcd", "dinov2", "aimv2"):
        config = native(name).config
        spec = describe_tower(config)
        positions, prefix, layer, any_size, _ = (cell.strip() for cell in ROWS[config.model_type].split("|"))
        assert positions.split(",")[0] == spec.positions
        assert int(prefix[0]) == spec.num_prefix_tokens
        assert int(layer) == spec.default_feature_layer
        assert (any_size == "yes") == spec.any_resolution
