"""Boxes, the frames they live in, and the text conventions that say them. Pure numpy and PIL; see docs/boxes.md."""

from .boxes import Boxes, Points
from .formats import BOX_FORMATS, BoxFormat, box_format
from .frame import ImageFrame
from .letterbox import letterbox_image, mean_colour
from .parsed import ParsedBoxes, score_boxes

__all__ = [
    "BOX_FORMATS",
    "BoxFormat",
    "Boxes",
    "ImageFrame",
    "ParsedBoxes",
    "Points",
    "box_format",
    "letterbox_image",
    "mean_colour",
    "score_boxes",
]
