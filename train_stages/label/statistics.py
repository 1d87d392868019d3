"""What a label run holds, in the columns of CLOC's Table 1: how many regions an image has, and how long texts are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..bad_records import BadRecord
from ..record_io import read_records
from ..records import Record
from ..webdataset import read_shard


@dataclass(frozen=True)
class LabelStatistics:
    """images, regions: counts. image_tokens, region_tokens: mean length of captions, and of regions' texts (`texts`,
    `captions` and `ocr`); None without any. tokens: what they are counted in."""

    images: int
    regions: int
    image_tokens: float | None
    region_tokens: float | None
    tokens: str

    @property
    def regions_per_image(self) -> float:
        """Mean over all images."""
        return self.regions / self.images if self.images else 0.0

    def table(self) -> str:
        """In two lines, as the paper's columns."""
        cells = [
            ("images", f"{self.images:,}"),
            ("regions per image", f"{self.regions_per_image:.1f}"),
            (f"image text ({self.tokens})", _number(self.image_tokens)),
            (f"region text ({self.tokens})", _number(self.region_tokens)),
        ]
        widths = [max(map(len, cell)) for cell in cells]
        return "\n".join(
            "  ".join(cell[row].rjust(width) for cell, width in zip(cells, widths, strict=True)) for row in (0, 1)
        )


def label_statistics(records: Iterable[Record], tokenizer: str | None = None) -> LabelStatistics:
    """Count over records. tokenizer: a folder or hub id; without it words are counted (the paper's tokens are T5's).

    Raises:
        UserError: no such tokenizer.
    """
    count, unit = _counter(tokenizer)
    images = regions = 0
    image_lengths, region_lengths = [0, 0], [0, 0]  # how many texts, and their length
    for record in records:
        images += 1
        regions += len(record.regions)
        _add(image_lengths, record.captions, count)
        for region in record.regions:
            read = [] if region.ocr is None else [region.ocr]
            _add(region_lengths, [*region.texts, *region.captions, *read], count)
    return LabelStatistics(images, regions, _mean(image_lengths), _mean(region_lengths), unit)


def read_shards(paths: Iterable[Path]) -> Iterator[Record]:
    """The good records of JSONL and WebDataset shards, without their images."""
    for path in paths:
        if path.suffix == ".tar":
            yield from (item[0] for item in read_shard(path, images=False) if not isinstance(item, BadRecord))
        else:
            yield from read_records(path).records


def _counter(tokenizer: str | None) -> tuple[Callable[[str], int], str]:
    if tokenizer is None:
        return lambda text: len(text.split()), "words"
    from ..region_labels import open_tokenizer

    opened = open_tokenizer(tokenizer)
    return lambda text: len(opened(text, add_special_tokens=False)["input_ids"]), "tokens"


def _add(lengths: list[int], texts: Iterable[str], count: Callable[[str], int]) -> None:
    for text in texts:
        lengths[0] += 1
        lengths[1] += count(text)


def _mean(lengths: list[int]) -> float | None:
    return lengths[1] / lengths[0] if lengths[0] else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
