"""Which sequences of tokens share a row."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of sequences that share a row of at most `row_tokens` tokens; every sequence is in one row.

    Best fit, the longest sequence first: into the fullest row that has room for it.

    Raises:
        ValueError: a sequence longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if length > row_tokens:
            raise ValueError(f"a sequence of {length} tokens does not fit into a row of {row_tokens}")
        place = bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([])
            free.append((row_tokens, len(rows) - 1))
            place = bisect_left(free, (length, -1))
        room, row = free.pop(place)
        rows[row].append(index)
        insort(free, (room - length, row))
    return rows
