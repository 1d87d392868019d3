"""The region record: one image and what is known of its regions. See docs/records.md for the format field by field.

Boxes are xyxy floats with continuous edges (0 <= x <= width) in pixels of the raster after EXIF transpose.
"""

from __future__ import annotations

import contextlib
import difflib
import operator
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from .masks import check_counts, compress_counts, decode_mask
from .phrases import normalise_phrase

EDGE_TOLERANCE = 1.0  # pixels by which rounding may push a box or a point over the image's edge


def _plain_number(value: Any) -> Any:
    """Numbers only: pydantic alone would read "12" and true as numbers, which in a data file are mistakes."""
    if value is None or isinstance(value, bool | str | bytes):
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)
    except (TypeError, OverflowError):
        raise ValueError(f"{value!r:.40} is not a number") from None


def _plain_integer(value: Any) -> Any:
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise ValueError(f"{value!r:.40} is not a whole number")


def _exactly(count: int, names: str) -> BeforeValidator:
    """A list, tuple or array of `count` numbers; `names` says in the message what they are."""

    def check(value: Any) -> Any:
        plain = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(plain, list | tuple) or len(plain) != count:
            raise ValueError(f"must be {count} numbers ({names})")
        return plain

    return BeforeValidator(check)


def _usable_text(value: Any) -> Any:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("is blank; leave it out instead")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair: JSON can escape it, no file can hold it
            raise ValueError(f"{value!r:.60} is not valid Unicode") from None
    return value


Number = Annotated[float, BeforeValidator(_plain_number), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(_plain_integer)]
Side = Annotated[Integer, Field(gt=0, lt=2**31)]
Text = Annotated[str, BeforeValidator(_usable_text)]
Texts = list[Text]


class _Strict(BaseModel):
    """Frozen, and no unknown field: a misspelt one would otherwise be lost without a word."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name in data:
                if name not in cls.model_fields:
                    near = difflib.get_close_matches(str(name), cls.model_fields, n=1, cutoff=0.5)
                    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown field {name!r}{hint}")
        return data


class Mask(_Strict):
    """A COCO RLE mask of the whole image: `size` = (height, width), `counts` = compressed run lengths.

    Uncompressed counts (a list of run lengths) and pycocotools' bytes are taken too and stored compressed. Counts that
    do not fill `size` exactly, or a mask without a single pixel, are errors.
    """

    size: Annotated[tuple[Integer, Integer], _exactly(2, "height, width")]
    counts: str

    @model_validator(mode="before")
    @classmethod
    def _compressed(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        counts = data.get("counts")
        if isinstance(counts, bytes):
            return {**data, "counts": counts.decode("ascii")}
        if isinstance(counts, list) and isinstance(data.get("size"), list | tuple) and len(data["size"]) == 2:
            return {**data, "counts": compress_counts(data["size"], counts)}
        return data

    @model_validator(mode="after")
    def _fills_its_size(self) -> Mask:
        runs = check_counts(self.size, self.counts)
        if not any(runs[1::2]):
            raise ValueError("the mask has no pixel; leave it out instead")
        return self

    def runs(self) -> list[int]:
        """Run lengths, background first, down one column after the other."""
        return check_counts(self.size, self.counts)

    def to_array(self) -> np.ndarray:
        """The mask as a (height, width) bool array."""
        return decode_mask(self.size, self.counts)


class PointLabel(_Strict):
    """A point (x, y in pixels) and the phrases true of what lies under it."""

    xy: Annotated[tuple[Number, Number], _exactly(2, "x, y")]
    texts: Texts = []


class Region(_Strict):
    """One region. `box_xyxy` alone is required; a box must be finite and have an area.

    category: class name. stuff: not one countable thing (sky, grass, or a crowd under one box). texts: referring
    phrases true of this region. captions: descriptions, which need not single it out. tags: words. ocr: transcript.
    mask: COCO RLE of the image's size. cluster: index of the region's cluster centre. score: the labeller's
    confidence. source: key into the `labels.json` beside the file.
    """

    box_xyxy: Annotated[tuple[Number, Number, Number, Number], _exactly(4, "x0, y0, x1, y1")]
    category: Text | None = None
    stuff: bool = False
    texts: Texts = []
    captions: Texts = []
    tags: Texts = []
    ocr: Text | None = None
    mask: Mask | None = None
    cluster: Annotated[Integer, Field(ge=0, lt=2**63)] | None = None
    score: Number | None = None
    source: Text | None = None

    @field_validator("box_xyxy")
    @classmethod
    def _has_area(cls, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        x0, y0, x1, y1 = box
        if x1 < x0 or y1 < y0:
            raise ValueError(f"the box {_show(box)} is inverted; it must be x0, y0, x1, y1 with x0 < x1 and y0 < y1")
        if x1 == x0 or y1 == y0:
            raise ValueError(f"the box {_show(box)} has no area")
        return box


class Record(_Strict):
    """One image with its regions. `image` (relative to the file's folder, or absolute), `width` and `height` (pixels
    of the raster after EXIF transpose) are required.

    A box or point that reaches over the image's edge by at most 1 px comes from rounding and is clipped to the image;
    by more, or with no area left, it makes the record invalid. A mask must have the image's size, and a phrase in
    `absent` must not stand at a region. Raises pydantic's ValidationError, a ValueError; `explain` makes one sentence
    of it.
    """

    image: Text
    width: Side
    height: Side
    split: Text | None = None
    captions: Texts = []
    tags: Texts = []
    absent: Texts = []
    points: list[PointLabel] = []
    regions: list[Region] = []

    @model_validator(mode="after")
    def _fits_the_image(self) -> Record:
        regions = [self._fit_region(index, region) for index, region in enumerate(self.regions)]
        points = [self._fit_point(index, point) for index, point in enumerate(self.points)]
        # The model is frozen for its users; this is still its construction.
        object.__setattr__(self, "regions", regions)
        object.__setattr__(self, "points", points)
        return self

    @model_validator(mode="after")
    def _absent_is_absent(self) -> Record:
        if self.absent:
            present = {normalise_phrase(text) for region in self.regions for text in region.texts}
            for text in self.absent:
                if normalise_phrase(text) in present:
                    raise ValueError(f"absent: {text!r} stands at a region, so it is not absent")
        return self

    def _fit_region(self, index: int, region: Region) -> Region:
        where = f"regions[{index}]"
        if region.mask is not None and region.mask.size != (self.height, self.width):
            raise ValueError(
                f"{where}.mask: its size {list(region.mask.size)} is not [height, width] = {[self.height, self.width]}"
            )
        box = region.box_xyxy
        clipped = (*self._clip(box[0], box[1]), *self._clip(box[2], box[3]))
        if clipped == box:
            return region
        if max(abs(old - new) for old, new in zip(box, clipped, strict=True)) > EDGE_TOLERANCE:
            raise ValueError(
                f"{where}.box_xyxy: the box {_show(box)} reaches outside the image of {self.width} x {self.height} px"
            )
        if clipped[0] == clipped[2] or clipped[1] == clipped[3]:
            raise ValueError(f"{where}.box_xyxy: nothing of the box {_show(box)} is inside the image")
        return region.model_copy(update={"box_xyxy": clipped})

    def _fit_point(self, index: int, point: PointLabel) -> PointLabel:
        clipped = self._clip(*point.xy)
        if clipped == point.xy:
            return point
        if max(abs(old - new) for old, new in zip(point.xy, clipped, strict=True)) > EDGE_TOLERANCE:
            raise ValueError(
                f"points[{index}].xy: {_show(point.xy)} is outside the image of {self.width} x {self.height} px"
            )
        return point.model_copy(update={"xy": clipped})

    def _clip(self, x: float, y: float) -> tuple[float, float]:
        return min(max(x, 0.0), float(self.width)), min(max(y, 0.0), float(self.height))


def explain(error: ValidationError) -> str:
    """One sentence for a failed check: where, and what is wrong (`regions[3].box_xyxy: the box ... has no area`)."""
    details = error.errors(include_url=False)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return _one_detail(details[0]) + more


def _one_detail(detail: ErrorDetails) -> str:
    where = ""
    for part in detail["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else part
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _show(numbers: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{number:g}" for number in numbers) + "]"
