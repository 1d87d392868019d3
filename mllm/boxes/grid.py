"""Where a format's numbers live: the picture they refer to, and how finely they divide it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .boxes import Boxes
from .frame import ImageFrame

DeclaredFrame = Literal["original", "padded_square", "input"]


@dataclass(frozen=True)
class CoordinateGrid:
    """The quanta along the sides of a format's declared frame.

    Attributes:
        frame: "original" = the original image; "padded_square" = the original centred in a square of its longer side,
            whatever the model input is; "input" = the model input, padding included.
        quanta: how many quanta a side is divided into; None = one per pixel of the declared frame.
    """

    frame: DeclaredFrame
    quanta: int | None

    def top(self, frame: ImageFrame) -> np.ndarray:
        """`(2,)` largest coordinate in quanta, for x and y."""
        return np.array(self._canvas(frame) if self.quanta is None else (self.quanta, self.quanta), dtype=np.float64)

    def quantum(self, frame: ImageFrame) -> tuple[float, float]:
        """One quantum in original pixels, for x and y."""
        scale, _ = self._map(frame)
        return (float(1 / scale[0]), float(1 / scale[1]))

    def to_quanta(self, boxes: Boxes, frame: ImageFrame) -> np.ndarray:
        """Original pixels -> `(N, 4)` quanta, not rounded, within `[0, top]`."""
        scale, offset = self._map(frame)
        corners = boxes.xyxy.reshape(-1, 2, 2) * scale + offset
        return np.clip(corners, 0.0, self.top(frame)).reshape(-1, 4)

    def to_original(self, quanta: np.ndarray, frame: ImageFrame) -> Boxes:
        """`(N, 4)` quanta -> original pixels, cut to the image: a box in the padding loses its area."""
        scale, offset = self._map(frame)
        corners = (quanta.reshape(-1, 2, 2) - offset) / scale
        return Boxes(np.clip(corners, 0.0, frame.original_size).reshape(-1, 4))

    def _canvas(self, frame: ImageFrame) -> tuple[int, int]:
        if self.frame == "original":
            return frame.original_size
        if self.frame == "padded_square":
            return (max(frame.original_size), max(frame.original_size))
        return frame.input_size

    def _map(self, frame: ImageFrame) -> tuple[np.ndarray, np.ndarray]:
        """Scale and offset, `(2,)` each: quanta = original pixels * scale + offset."""
        canvas = np.array(self._canvas(frame), dtype=np.float64)
        per_pixel = self.top(frame) / canvas
        if self.frame == "input":
            return np.array(frame.scale) * per_pixel, np.array(frame.offset) * per_pixel
        # The padding of the square is a whole number of pixels, rounded down, as LLaVA and Shikra paste the image.
        offset = (canvas - np.array(frame.original_size)) // 2
        return per_pixel, offset * per_pixel


def nearest_quanta(quanta: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Round `(N, 4)` quanta to whole ones; a box thinner than a quantum is widened to one.

    Every edge moves by at most one quantum (half of one unless the box had to be widened).

    Args:
        quanta: `(N, 4)` xyxy within `[0, top]`.
        top: `(2,)` largest coordinate for x and y.

    Returns:
        `(N, 4)` int64.
    """
    low, high = quanta[:, :2], quanta[:, 2:]
    first, last = np.rint(low), np.rint(high)
    flat = first == last
    # Both edges round to the same line: widen to the side on which the box lies.
    first = np.where(flat & ((low + high) / 2 < first), first - 1, first)
    first = np.where(flat, np.minimum(first, top - 1), first)
    last = np.where(flat, first + 1, last)
    return np.concatenate([first, last], axis=1).astype(np.int64)
