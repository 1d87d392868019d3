"""Class labels of regions: one object class each, and a set of token ids for those with text (RICE, section 3.1)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..vision_towers.errors import UserError
from ..vision_towers.packaged import model_source
from .records import Record, Region

ObjectLabels = Literal["cluster", "category", "tags"]
NO_CLASS = -1


@dataclass(frozen=True)
class ObjectClasses:
    """The object classes of a run; class i is named `names[i]`.

    source: "cluster" (the index of the region's cluster centre, the paper's label), "category" (its class name, until
        cluster centres exist) or "tags" (what it shows: tags and category, as in "red star").
    stuff: whether regions marked as stuff take part.
    """

    names: list[str]
    source: ObjectLabels
    stuff: bool

    @classmethod
    def of(cls, records: Iterable[Record], source: ObjectLabels, stuff: bool) -> "ObjectClasses":
        """The classes that occur. Clusters keep their numbers: unseen ones up to the largest are classes too.

        Raises UserError when no region has such a label.
        """
        regions = [region for record in records for region in record.regions if stuff or not region.stuff]
        if source == "cluster":
            clusters = [region.cluster for region in regions if region.cluster is not None]
            names = [str(number) for number in range(max(clusters, default=-1) + 1)]
        elif source in ("category", "tags"):
            label = tagged_name if source == "tags" else _category
            names = sorted({name for region in regions if (name := label(region)) is not None})
        else:
            raise UserError(f"object_labels is '{source}', use cluster, category or tags")
        if not names:
            raise UserError(f"no region of the records has a {source}; give such records or change data.object_labels")
        return cls(names, source, stuff)

    def __len__(self) -> int:
        return len(self.names)

    def labels(self, record: Record) -> list[int]:
        """The class of every region of a record; NO_CLASS where it has none, an unknown one, or is unwanted stuff."""
        ids = self._ids()
        return [ids.get(self._name(region), NO_CLASS) for region in record.regions]

    def _name(self, region: Region) -> str | None:
        if region.stuff and not self.stuff:
            return None
        if self.source == "cluster":
            return None if region.cluster is None else str(region.cluster)
        return tagged_name(region) if self.source == "tags" else region.category

    def _ids(self) -> dict[str | None, int]:
        # Built once; a frozen dataclass has no other place for it than its dict.
        if "_index" not in self.__dict__:
            object.__setattr__(self, "_index", {name: number for number, name in enumerate(self.names)})
        return self.__dict__["_index"]


def tagged_name(region: Region) -> str | None:
    """Tags and category as one name ("red star"); None without a category. The transcript is no part of it."""
    if region.category is None:
        return None
    return " ".join([*(tag for tag in dict.fromkeys(region.tags) if tag != region.category), region.category])


def _category(region: Region) -> str | None:
    return region.category


class TextClasses:
    """The token classes of transcripts: every id of a tokenizer is a class, special tokens never occur."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._never = set(tokenizer.all_special_ids)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def labels(self, record: Record) -> list[list[int]]:
        """The distinct token ids (ascending) of each region's transcript; empty where it has none."""
        return [self.token_set(region.ocr) if region.ocr else [] for region in record.regions]

    def token_set(self, text: str) -> list[int]:
        """`label = set(tokenizer(text))`, without the special tokens a tokenizer adds or falls back to."""
        return sorted(set(self.tokenizer(text, add_special_tokens=False)["input_ids"]) - self._never)


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer that transformers can read from a folder or the hub cache. Raises UserError when it cannot."""
    try:
        return AutoTokenizer.from_pretrained(model_source(path))
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer can be opened at '{path}'; give the folder of one as data.tokenizer") from error
