"""Where a model is right: by the size of what it looks for, and by how many things look like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .intervals import mean_interval
from .task_rows import UNKNOWN

# Upper edges of the groups by box area, in shares of the image's area. Not COCO's pixels: images differ in size.
SIZE_EDGES = (0.01, 0.04, 0.16, 1.0)
SIZE_NAMES = ("under 1 %", "1 to 4 %", "4 to 16 %", "over 16 %")
DISTRACTOR_NAMES = ("0", "1", "2", "3", "4 or more")


def by_box_size(samples: Sequence[Mapping]) -> list[dict]:
    """Share of right answers by the area of the true box: `{"group", "n", "value", "ci95"}`, small boxes first. Rows
    without exactly one true or asked box are left out."""
    return _groups(samples, _size_group, SIZE_NAMES)


def by_distractors(samples: Sequence[Mapping]) -> list[dict]:
    """The same by the number of other things of the target's category; rows where nobody knows are left out."""
    return _groups(samples, _distractor_group, DISTRACTOR_NAMES)


def _size_group(sample: Mapping) -> int | None:
    box = sample["region_box"]
    if not box:
        return None
    share = (box[2] - box[0]) * (box[3] - box[1]) / (sample["width"] * sample["height"])
    return next((group for group, edge in enumerate(SIZE_EDGES) if share < edge), len(SIZE_EDGES) - 1)


def _distractor_group(sample: Mapping) -> int | None:
    count = sample["distractors"]
    return None if count == UNKNOWN else min(count, len(DISTRACTOR_NAMES) - 1)


def _groups(samples: Sequence[Mapping], group_of: Callable[[Mapping], int | None], names: Sequence[str]) -> list[dict]:
    groups: dict[int | None, list[Mapping]] = {}
    for sample in samples:
        groups.setdefault(group_of(sample), []).append(sample)
    found = []
    for group, name in enumerate(names):
        if group in groups:
            right = [float(sample["correct"]) for sample in groups[group]]
            interval = mean_interval(right, [sample["image_id"] for sample in groups[group]])
            found.append({"group": name, "n": len(right), "value": sum(right) / len(right), "ci95": list(interval)})
    return found
