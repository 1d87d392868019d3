"""All tags of the records, as classes with a number."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .phrases import normalise_phrase
from .records import Record, Region


@dataclass(frozen=True)
class TagBank:
    """Tag i is named `names[i]`. Two spellings of one tag (case, spaces) are one tag."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> "TagBank":
        """The tags of the images, and the tags and categories of their regions; there may be none."""
        found: set[str] = set()
        for record in records:
            found.update(map(normalise_phrase, record.tags))
            for region in record.regions:
                found.update(map(normalise_phrase, tags_of(region)))
        return cls(tuple(sorted(found)))

    def __len__(self) -> int:
        return len(self.names)

    def ids(self, tags: Iterable[str]) -> list[int]:
        """Their numbers, ascending, each once; a tag that is not in the bank has none."""
        numbers = (self._numbers.get(normalise_phrase(tag)) for tag in tags)
        return sorted({number for number in numbers if number is not None})

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def tags_of(region: Region) -> list[str]:
    """The region's tags and its category."""
    return [*region.tags, *([region.category] if region.category else [])]
