"""Boxes of likely objects without any weights: segments of one colour, merged step by step, as selective search does.

Every segment on the way from the smallest pieces to the whole image is a candidate. The two neighbours that are most
alike are merged first: alike in colour, small, and filling their common box (Uijlings et al., IJCV 2013, without its
texture term).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from skimage.color import rgb2lab
from skimage.graph import RAG, merge_hierarchical
from skimage.segmentation import felzenszwalb

LONG_SIDE = 320  # pixels at which an image is segmented
SCALES = (60.0, 200.0)  # of the first segments: fine ones, and coarse ones that do not fall to pieces
BINS = 12  # of each of the three colour histograms
_MIN_SIZE = 30  # pixels of a first segment


@dataclass
class _Segment:
    """pixels: how many. colours: their histograms, `(3 * BINS,)`, sum 3. box: xyxy. born: the unlikeness of the two
    that were merged into it."""

    pixels: float
    colours: np.ndarray
    box: np.ndarray
    born: float = 0.0


@dataclass
class _Found:
    boxes: list[np.ndarray] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, segment: _Segment, died: float) -> None:
        """died: the unlikeness to the segment that it was merged with. One that stays long by itself stands out."""
        self.boxes.append(segment.box)
        self.scores.append(max(0.0, died - segment.born))


def segment_boxes(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of an RGB image: float32 boxes `(N, 4)`, xyxy in its pixels, and how much each stands out, `(N,)`, in
    0..3. Many overlap; suppress them. The same image gives the same boxes."""
    scale = min(1.0, LONG_SIDE / max(image.size))
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    pixels = np.asarray(small)
    lab = rgb2lab(pixels)
    found = _Found()
    for first in SCALES:
        _merge(felzenszwalb(pixels, scale=first, sigma=0.8, min_size=_MIN_SIZE), lab, found)
    factors = np.tile(np.divide(image.size, small.size), 2)
    return (np.array(found.boxes).reshape(-1, 4) * factors).astype(np.float32), np.array(found.scores, np.float32)


def _merge(labels: np.ndarray, lab: np.ndarray, found: _Found) -> None:
    segments = _first_segments(labels, lab)
    graph = RAG()
    total = float(labels.size)
    for label, segment in enumerate(segments):
        graph.add_node(label, labels=[label], segment=segment)
    for one, other in _neighbours(labels):
        graph.add_edge(int(one), int(other), weight=_unlike(segments[one], segments[other], total))

    def join(graph: RAG, source: int, target: int) -> None:
        one, other = graph.nodes[source]["segment"], graph.nodes[target]["segment"]
        weight = graph[source][target]["weight"]
        for segment in (one, other):
            found.add(segment, weight)
        graph.nodes[target]["segment"] = _join(one, other, weight)

    def weigh(graph: RAG, source: int, target: int, neighbour: int) -> dict[str, float]:
        del source
        return {"weight": _unlike(graph.nodes[target]["segment"], graph.nodes[neighbour]["segment"], total)}

    merge_hierarchical(labels, graph, np.inf, rag_copy=False, in_place_merge=True, merge_func=join, weight_func=weigh)
    for node in graph.nodes:  # the whole image: a candidate, but the last
        found.add(graph.nodes[node]["segment"], graph.nodes[node]["segment"].born)


def _first_segments(labels: np.ndarray, lab: np.ndarray) -> list[_Segment]:
    count = int(labels.max()) + 1
    flat = labels.ravel()
    pixels = np.bincount(flat, minlength=count).astype(float)
    low, high = np.array([0.0, -60.0, -60.0]), np.array([100.0, 60.0, 60.0])  # photographs are seldom more colourful
    bins = np.clip((lab - low) / (high - low) * BINS, 0, BINS - 1).astype(int).reshape(-1, 3)
    histograms = [np.bincount(flat * BINS + bins[:, c], minlength=count * BINS).reshape(count, BINS) for c in range(3)]
    colours = np.concatenate(histograms, axis=1) / pixels[:, None]
    rows, columns = np.indices(labels.shape).reshape(2, -1)
    boxes = np.empty((count, 4))
    boxes[:, :2], boxes[:, 2:] = np.inf, -np.inf
    for place, edge in ((0, columns), (1, rows)):
        np.minimum.at(boxes[:, place], flat, edge)
        np.maximum.at(boxes[:, place + 2], flat, edge + 1)
    return [_Segment(pixels[i], colours[i], boxes[i]) for i in range(count)]


def _neighbours(labels: np.ndarray) -> np.ndarray:
    """Pairs of labels that touch, `(P, 2)`, each once."""
    beside = np.stack([labels[:, :-1].ravel(), labels[:, 1:].ravel()], axis=1)
    below = np.stack([labels[:-1].ravel(), labels[1:].ravel()], axis=1)
    pairs = np.concatenate([beside, below])
    return np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)


def _join(one: _Segment, other: _Segment, weight: float) -> _Segment:
    pixels = one.pixels + other.pixels
    colours = (one.colours * one.pixels + other.colours * other.pixels) / pixels
    return _Segment(pixels, colours, _around(one, other), weight)


def _around(one: _Segment, other: _Segment) -> np.ndarray:
    return np.concatenate([np.minimum(one.box[:2], other.box[:2]), np.maximum(one.box[2:], other.box[2:])])


def _unlike(one: _Segment, other: _Segment, total: float) -> float:
    """0: the same colours, tiny, and together a full box; 3: the opposite."""
    width, height = (box := _around(one, other))[2:] - box[:2]
    pixels = one.pixels + other.pixels
    colour = 1 - np.minimum(one.colours, other.colours).sum() / 3
    return float(colour + pixels / total + (width * height - pixels) / total)
