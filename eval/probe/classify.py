"""What class a region has, told from its embedding: by its nearest neighbours, and by logistic regression."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..intervals import mean_interval
from .regions import ProbeRegions

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the neighbours' votes; both as in DINO (arXiv 2104.14294, Sec. 4.1)
STEPS = 200  # of the logistic regression's solver (L-BFGS), at most


@dataclass(frozen=True)
class Share:
    """A share of rows: how many there are, and the 95 % interval over images. `class_mean` is the mean of the shares of
    the classes. Without rows all is None."""

    value: float | None
    n: int
    ci95: tuple[float, float] | None
    class_mean: float | None = None

    def row(self) -> dict[str, Any]:
        """For JSON; without what is not there."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        return found | ({"ci95": list(self.ci95)} if self.ci95 is not None else {})


def share(right: np.ndarray, images: np.ndarray, classes: np.ndarray | None = None) -> Share:
    """right: `(N,)` 0..1. images: `(N,)`, rows of one image go together. classes: `(N,)`, for `class_mean`."""
    if not len(right):
        return Share(None, 0, None)
    values = right.astype(float)
    by_class = None
    if classes is not None:
        by_class = float(np.mean([values[classes == name].mean() for name in np.unique(classes)]))
    interval = mean_interval(values.tolist(), images.tolist())
    return Share(float(values.mean()), len(values), interval, by_class)


def nearest_neighbours(train: ProbeRegions, test: ProbeRegions) -> Share:
    """k-nearest-neighbour top-1: the `NEIGHBOURS` regions of largest cosine vote with exp(cos / `TEMPERATURE`)."""
    from sklearn.neighbors import KNeighborsClassifier

    if not len(train) or not len(test):
        return Share(None, 0, None)

    def votes(distances: np.ndarray) -> np.ndarray:  # 1 - cosine; a factor common to all changes nothing
        return np.exp(-distances / TEMPERATURE)

    count = min(NEIGHBOURS, len(train))
    classifier: Any = KNeighborsClassifier
    with _few_of_each():
        found = classifier(count, metric="cosine", weights=votes).fit(train.features, train.classes)
    return share(found.predict(test.features) == test.classes, test.images, test.classes)


def linear(train: ProbeRegions, test: ProbeRegions) -> Share:
    """Top-1 of a logistic regression on standardised embeddings (scikit-learn's, L2 penalty C = 1, `STEPS` at most)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if not len(train) or not len(test):
        return Share(None, 0, None)
    if len(np.unique(train.classes)) == 1:
        return share(test.classes == train.classes[0], test.images, test.classes)
    scaler = StandardScaler().fit(train.features)
    with _few_of_each():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the same number of steps for every tower is the protocol
        head = LogisticRegression(max_iter=STEPS).fit(scaler.transform(train.features), train.classes)
    return share(head.predict(scaler.transform(test.features)) == test.classes, test.images, test.classes)


@contextmanager
def _few_of_each() -> Iterator[None]:
    """Without scikit-learn's guess that classes with few regions each are numbers to regress."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        yield


def majority(train: ProbeRegions, test: ProbeRegions) -> Share:
    """What always answering the most frequent class of `train` scores."""
    if not len(train) or not len(test):
        return Share(None, 0, None)
    most = np.bincount(train.classes).argmax()
    return share(test.classes == most, test.images, test.classes)
