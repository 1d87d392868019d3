"""In which order many questions are asked, and which of them together."""

from collections.abc import Hashable, Sequence


def plan_batches(pictures: Sequence[Hashable], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Positions of the questions, batch by batch.

    Questions about one picture stand side by side (its prefix is computed once and may be dropped after them), sorted
    by length; pictures are sorted by their longest question, longest first: batches hold prompts of like length, memory
    runs out at the start or never, and the time left is not underestimated. Equal lengths keep the order of asking.

    Args:
        pictures: for each question what its picture is told apart by.
        lengths: of the prompts, in whatever unit.
        size: questions a batch.
    """
    of_picture: dict[Hashable, list[int]] = {}
    for position, picture in enumerate(pictures):
        of_picture.setdefault(picture, []).append(position)
    groups = [sorted(group, key=lambda position: -lengths[position]) for group in of_picture.values()]
    groups.sort(key=lambda group: -lengths[group[0]])
    ordered = [position for group in groups for position in group]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
