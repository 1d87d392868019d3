"""Raw images -> region records: the data engines of the papers, on one runner. See docs/label.md."""

from .engines import find_engine
from .labeller import Engine, Labelled, Labeller, PassedOver, Workplace
from .plan import ImageSource
from .run import LabelResult, RunConfig, label_images

__all__ = [
    "Engine",
    "ImageSource",
    "LabelResult",
    "Labelled",
    "Labeller",
    "PassedOver",
    "RunConfig",
    "Workplace",
    "find_engine",
    "label_images",
]
