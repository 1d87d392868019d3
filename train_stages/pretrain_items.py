"""The items of stage 0: what an objective makes of an image and its record, from cached pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..mllm.boxes import ImageFrame
from ..vision_towers.errors import UserError
from .pixels import PixelCache
from .records import Record

Known = TypeVar("Known")


class ItemMaker(Protocol[Known]):
    """An objective's side of the data.

    nothing: the sentence for data in which no image is of use.
    """

    nothing: str

    def prepare(self, record: Record, frame: ImageFrame) -> Known | None:
        """What the record says that the objective can use, boxes in pixels of the input; None when there is nothing."""
        ...

    def item(self, pixels: Tensor, known: Known, rng: np.random.Generator) -> dict[str, Any]:
        """One item, drawn anew each time. pixels: uint8 (3, S, S), may be written to."""
        ...

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch that the objective's forward takes as keyword arguments."""
        ...


class CachedItems(Dataset, Generic[Known]):
    """The items of a pixel cache; images that are of no use to the objective are left out.

    Draws from numpy's global generator, which the training engine seeds for every item and epoch.
    known: of each image that takes part.
    Raises UserError when no image is left.
    """

    def __init__(self, cache: PixelCache, maker: ItemMaker[Known]):
        self._pixels, self.maker = cache.pixels, maker
        self._rows: list[int] = []
        self.known: list[Known] = []
        for row, (record, frame) in enumerate(zip(cache.records, cache.frames, strict=True)):
            known = maker.prepare(record, frame)
            if known is not None:
                self._rows.append(row)
                self.known.append(known)
        if not self._rows:
            raise UserError(maker.nothing)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = torch.from_numpy(np.array(self._pixels[self._rows[index]]))  # a copy: the memory map is read-only
        return self.maker.item(pixels, self.known[index], seeded_generator())


def seeded_generator() -> np.random.Generator:
    """A generator whose seed is drawn from numpy's global one."""
    return np.random.default_rng(np.random.randint(0, 2**32, size=4, dtype=np.uint64))
