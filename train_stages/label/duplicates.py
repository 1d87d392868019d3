"""Near duplicates: pictures that are the same up to size, compression and small changes of tone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...vision_towers.errors import UserError
from ..images import open_image

HASH_SIDE = 16  # 16 x 16 = 256 bits


def picture_hash(path: Path) -> np.ndarray:
    """The difference hash of a picture, uint8 `(32,)`: which of two neighbours of its 17 x 16 thumbnail is brighter.

    Raises:
        ImageError: it cannot be read.
    """
    small = open_image(path).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(small, dtype=np.int16)
    return np.packbits(values[:, 1:] > values[:, :-1])


class DuplicateFinder:
    """Keeps the first of pictures whose 256-bit hashes differ in at most `distance` bits (ours; the papers do not say
    how, or whether, they do it). Exact search: n pictures cost n^2 / 2 comparisons of 32 bytes.

    Raises:
        UserError: faiss is not installed.
    """

    def __init__(self, distance: int):
        try:
            import faiss
        except ImportError:
            raise UserError("near duplicates are found by faiss; pip install 'regiontower[label]'.") from None
        self._distance = distance
        self._kept = faiss.IndexBinaryFlat(HASH_SIDE**2)

    def seen(self, hashes: Sequence[np.ndarray]) -> list[bool]:
        """For each, in order: whether one before it, in this call or another, is its near duplicate."""
        if not hashes:
            return []
        codes = np.stack(hashes)
        found = np.zeros(len(codes), dtype=bool)
        if self._kept.ntotal:
            found = self._kept.search(codes, 1)[0][:, 0] <= self._distance
        kept: list[int] = []
        for row in np.flatnonzero(~found):
            apart = np.bitwise_count(codes[kept] ^ codes[row]).sum(axis=1)
            if (apart <= self._distance).any():
                found[row] = True
            else:
                kept.append(int(row))
        self._kept.add(codes[kept])
        return found.tolist()
