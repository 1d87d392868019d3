"""A page to judge clusters by: for some of them, the regions nearest to their centre."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..images import open_image
from ..scenes.glyphs import load_font
from .region_filters import pixel_box

CELL_PX = 112
GAP_PX = 4
NAME_PX = 72
COLUMNS = 8
ROWS = 12  # at most


class Nearest:
    """Keeps the `COLUMNS` nearest regions of the clusters that are shown."""

    def __init__(self, clusters: Iterable[int]):
        self._found: dict[int, list[tuple[float, str, tuple[float, ...]]]] = {cluster: [] for cluster in clusters}

    def offer(self, cluster: int, cosine: float, image: str, box: Sequence[float]) -> None:
        """A region of `image` (a path) with its cosine to the centre."""
        heap = self._found.get(cluster)
        if heap is not None:
            (heapq.heappush if len(heap) < COLUMNS else heapq.heappushpop)(heap, (cosine, image, tuple(box)))

    def offers(self) -> list[tuple[int, float, str, tuple[float, ...]]]:
        """What is kept, as `offer` takes it."""
        return [(cluster, *kept) for cluster, heap in self._found.items() for kept in sorted(heap)]

    def rows(self) -> list[tuple[int, list[tuple[str, tuple[float, ...]]]]]:
        """Cluster -> (image, box) of its regions, nearest first; clusters without any are left out."""
        return [
            (cluster, [(image, box) for _, image, box in sorted(heap, reverse=True)])
            for cluster, heap in self._found.items()
            if heap
        ]


def shown_clusters(clusters: int) -> range:
    """Which of so many are on the page: all, or at most `ROWS`, evenly."""
    return range(0, clusters, -(-clusters // ROWS))


def cluster_page(nearest: Nearest, folder: Path) -> Image.Image:
    """A row for each cluster: its number, then its regions, nearest first. folder: that paths of images start from."""
    rows = nearest.rows()
    step = CELL_PX + GAP_PX
    page = Image.new("RGB", (NAME_PX + COLUMNS * step, max(1, len(rows)) * step), "white")
    draw, font = ImageDraw.Draw(page), load_font("DejaVuSans.ttf", 14)
    for number, (cluster, regions) in enumerate(rows):
        draw.text((6, number * step + CELL_PX // 2 - 8), str(cluster), fill="black", font=font)
        for column, (image, box) in enumerate(regions):
            cut = open_image(folder / image).crop(pixel_box(box))
            cut.thumbnail((CELL_PX, CELL_PX))
            left = NAME_PX + column * step + (CELL_PX - cut.width) // 2
            page.paste(cut, (left, number * step + (CELL_PX - cut.height) // 2))
    return page
