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
        else:
            names = sorted({name for region in regions if (name := class_name(region, source)) is not None})
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
        return None if region.stuff and not self.stuff else class_name(region, self.source)

    def _ids(self) -> dict[str | None, int]:
        # Built once; a frozen dataclass has no other place for it than its dict.
        if "_index" not in self.__dict__:
            object.__setattr__(self, "_index", {name: number for number, name in enumerate(self.names)})
        return self.__dict__["_index"]


def class_name(region: Region, source: ObjectLabels) -> str | None:
    """What the region's class is called; None where it has none. Raises UserError for another `source`."""
    if source == "cluster":
        return None if region.cluster is None else str(region.cluster)
    if source == "category":
        return region.category
    if source == "tags":
        return tagged_name(region)
    raise UserError(f"object_labels is '{source}', use cluster, category or tags")


def tagged_name(region: Region) -> str | None:
    """Tags and category as one name ("red star"); None without a category. The transcript is no part of it."""
    if region.category is None:
        return None
    return " ".join([*(tag for tag in dict.fromkeys(region.tags) if tag != region.category), region.category])


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
