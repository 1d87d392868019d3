"""Region records as maps of labels: what every pixel is (semantic), and which segment it belongs to (panoptic)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...mllm.boxes import ImageFrame
from ...train_stages.records import Record, Region
from ...train_stages.region_labels import NO_CLASS, ObjectClasses, tagged_name
from ...vision_towers import UserError

VOID = -1  # a pixel without a label; it counts neither way
ClassSource = Literal["category", "tags"]


@dataclass(frozen=True)
class SegmentClasses:
    """The classes of a segmentation; class i is named `objects.names[i]`.

    stuff: for each class whether none of its regions is a countable thing. Where some are, its regions marked as stuff
    are crowds. background: the class of unlabelled pixels; None: they are void.
    """

    objects: ObjectClasses
    stuff: tuple[bool, ...]
    background: int | None = None

    @classmethod
    def of(cls, records: Iterable[Record], source: ClassSource, background: str | None = None) -> SegmentClasses:
        """The classes of the regions that have a mask: by `category`, or by `tags` and category ("red star").

        Raises:
            UserError: another source, or no region with a mask and such a label.
        """
        if source not in ("category", "tags"):
            raise UserError(f"classes of segments have words: labels must be category or tags, got {source!r}.")
        regions = [region for record in records for region in record.regions if region.mask is not None]
        named = [(_name(region, source), region.stuff) for region in regions]
        things = {name for name, stuff in named if name is not None and not stuff}
        found = {name for name, _ in named if name is not None}
        if not found:
            raise UserError("no region of the records has both a mask and a category; a segmentation needs such.")
        if background in things:
            raise UserError(f"background {background!r} is the name of things in the records; give another name.")
        names = sorted(found | ({background} if background else set()))
        return cls(
            ObjectClasses(names, source, stuff=True),
            tuple(name not in things for name in names),
            names.index(background) if background else None,
        )

    @property
    def names(self) -> list[str]:
        return self.objects.names

    def __len__(self) -> int:
        return len(self.names)

    def name_of(self, region: Region) -> str | None:
        """What the class of a region would be called; None where it has none."""
        return _name(region, self.objects.source)

    def numbers(self, names: Sequence[str]) -> list[int]:
        """The numbers of classes by their names. Raises UserError naming the nearest one for a name that is none."""
        for name in names:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.names[:10])} ..."
                raise UserError(f"no region with a mask is of the class {name!r}; {hint}")
        return [self.names.index(name) for name in names]


@dataclass(frozen=True)
class PanopticMap:
    """Segments that do not overlap.

    segment: `(height, width)` int, places in `classes`, or `VOID`. classes: the class of each segment. crowd: for each
    whether it is many things under one outline; a segment of stuff is none.
    """

    segment: np.ndarray
    classes: tuple[int, ...]
    crowd: tuple[bool, ...]

    @property
    def semantic(self) -> np.ndarray:
        """`(height, width)` int64: the class of each pixel, or `VOID`; a crowd is of its class, too."""
        return np.array([*self.classes, VOID], dtype=np.int64)[self.segment]

    def seen(self, frame: ImageFrame, grid_hw: tuple[int, int]) -> PanopticMap:
        """The map as a grid over a view sees it: each cell takes the pixel under its centre; in the padding it is void.

        frame: this map's image -> view. grid_hw: rows and columns that the whole view is divided into.
        """
        cells = []
        for axis, (count, length) in enumerate(zip(grid_hw[::-1], self.segment.shape[::-1], strict=True)):
            centres = (np.arange(count) + 0.5) * (frame.input_size[axis] / count)
            places = np.floor((centres - frame.offset[axis]) / frame.scale[axis]).astype(int)
            cells.append((places.clip(0, length - 1), (places >= 0) & (places < length)))
        (columns, in_x), (rows, in_y) = cells
        return self._with(np.where(in_y[:, None] & in_x, self.segment[rows[:, None], columns], VOID))

    def renumbered(self, numbers: Sequence[int]) -> PanopticMap:
        """Class c becomes `numbers[c]`; segments whose class becomes `VOID` are void."""
        gone = [place for place, label in enumerate(self.classes) if numbers[label] == VOID]
        renamed = PanopticMap(self.segment, tuple(numbers[label] for label in self.classes), self.crowd)
        return renamed._with(np.where(np.isin(self.segment, gone), VOID, self.segment))

    def _with(self, segment: np.ndarray) -> PanopticMap:
        """Of the segments those that are in `segment`, whose numbers are still this map's."""
        left = np.unique(segment[segment != VOID])
        new = np.full(len(self.classes) + 1, VOID)
        new[left] = np.arange(len(left))
        kept = left.tolist()
        return PanopticMap(new[segment], tuple(self.classes[i] for i in kept), tuple(self.crowd[i] for i in kept))


def panoptic_map(record: Record, classes: SegmentClasses) -> PanopticMap:
    """The masks of a record as segments, in pixels of its image.

    Where masks overlap: things lie over stuff; of two things, and of two regions of stuff, the smaller lies on top, and
    of equal ones the later. The regions of one class of stuff are one segment. Pixels of no mask are void, or of
    `classes.background`. What is there, but not where or what exactly, is void as well: regions without a class, with
    their mask, and in a background regions without a mask, with their box.
    """
    segment = np.full((record.height, record.width), VOID)
    kinds: list[int] = []
    crowd: list[bool] = []
    stuff: dict[int, int] = {}

    def number(label: int, countless: bool) -> int:
        if classes.stuff[label] and label in stuff:
            return stuff[label]
        kinds.append(label)
        crowd.append(countless and not classes.stuff[label])
        if classes.stuff[label]:
            stuff[label] = len(kinds) - 1
        return len(kinds) - 1

    if classes.background is not None:
        segment[:] = number(classes.background, True)
        for region in record.regions:
            if region.mask is None:
                segment[_pixels(region)] = VOID
    masked = [
        (region.mask.to_array(), label, region.stuff)
        for region, label in zip(record.regions, classes.objects.labels(record), strict=True)
        if region.mask is not None
    ]
    for mask, label, countless in sorted(masked, key=lambda item: (not item[2], -int(item[0].sum()))):
        segment[mask] = VOID if label == NO_CLASS else number(label, countless)
    return PanopticMap(segment, tuple(kinds), tuple(crowd))._with(segment)


def _name(region: Region, source: str) -> str | None:
    return tagged_name(region) if source == "tags" else region.category


def _pixels(region: Region) -> tuple[slice, slice]:
    """The pixels that a box touches."""
    x0, y0, x1, y1 = region.box_xyxy
    return slice(int(y0), int(np.ceil(y1))), slice(int(x0), int(np.ceil(x1)))
