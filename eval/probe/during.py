"""A small probe for the time of training: neighbours of held-out regions, in seconds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedModel

from ...train_stages.pixels import PixelCache
from ...train_stages.region_labels import ObjectLabels
from .classify import nearest_neighbours
from .labels import object_classes
from .regions import ProbeRegions, labelled_regions, reader

ASKED_EVERY = 5  # every fifth image is asked about, the others are known
MOST = 4_000  # regions


def neighbours_during(labels: ObjectLabels) -> Callable[[PreTrainedModel, PixelCache], dict[str, float]]:
    """What `pretrain(probe=)` takes: `knn_top1` of the tower's own region embeddings, objects only.

    Held-out images vote on held-out images, so that memorised ones cannot. Nothing is measured where a record set has
    no such labels or fewer images than `ASKED_EVERY`.
    labels: what a class is, as in `ProbeConfig`.
    """

    def measure(tower: PreTrainedModel, cache: PixelCache) -> dict[str, float]:
        _, of_record = object_classes(cache.records, labels)
        found = labelled_regions(reader(tower, "own"), cache, of_record, MOST, progress=None)
        asked = found.images % ASKED_EVERY == ASKED_EVERY - 1
        share = nearest_neighbours(_part(found, ~asked), _part(found, asked))
        return {} if share.value is None else {"knn_top1": share.value}

    return measure


def _part(regions: ProbeRegions, rows: np.ndarray) -> ProbeRegions:
    return ProbeRegions(regions.features[rows], regions.classes[rows], regions.images[rows])
