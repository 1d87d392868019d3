"""Whether conversations that come as text write boxes in the model's own convention."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ..mllm.boxes import BOX_FORMATS, BoxFormat, ImageFrame, box_format
from ..mllm.findings import Finding
from .chat_samples import Unusable
from .mixture_recipe import CONVERSATIONS, MixtureData, MixtureSource
from .mixture_sources import open_source

SAMPLE = 500  # conversations that are read of a source
FEW = 3  # answers in another convention; fewer may be anything in brackets
_WIDE = ImageFrame.identity((100_000, 100_000))  # no picture is opened, so a number of pixels is never too large


def foreign_boxes(data: MixtureData, convention: str) -> Iterator[Finding]:
    """Sources whose answers hold boxes that the model would read as malformed and another convention reads.

    Region records are written in the model's convention, whatever it is; conversations are taken as they stand.
    """
    spoken = box_format(convention)
    for source in data.sources:
        if source.format != CONVERSATIONS or source.stream:
            continue
        names = [name for name in (_foreign(answer, spoken) for answer in _answers(source)) if name is not None]
        if len(names) >= FEW:
            other, file = max(dict.fromkeys(names), key=names.count), ", ".join(source.names())
            yield Finding(
                "warning",
                f"{len(names)} answers of {file} hold boxes as {other}, the model has {convention}",
                "the model learns two conventions and its boxes are read by one",
                f"write the boxes of these conversations as {convention}, or make them region records",
            )


def _answers(source: MixtureSource) -> Iterator[str]:
    examples = open_source(source)
    for index in islice(range(len(examples)), SAMPLE):
        try:
            yield from (answer for _, answer in examples[index].turns)
        except Unusable:
            continue  # training counts it


def _foreign(answer: str, spoken: BoxFormat) -> str | None:
    """The convention in which an answer holds boxes, when it is not the model's."""
    if spoken.parse(answer, _WIDE).status == "boxes":
        return None
    formats = (name for name in BOX_FORMATS if name != spoken.name)
    return next((name for name in formats if box_format(name).parse(answer, _WIDE).status == "boxes"), None)
