"""Dense tasks: open-vocabulary semantic and panoptic segmentation with a parameter-efficiently tuned tower."""

from .label_maps import PanopticMap, SegmentClasses, panoptic_map
from .panoptic_metrics import class_quality, panoptic_counts, panoptic_quality
from .run import SegmentConfig, measure_segmentation, segmentation_table
from .segmenter import Segmenter, SegmenterConfig, load_segmenter, save_segmenter
from .semantic_metrics import class_iou, confusion, mean_iou, pixel_counts
from .text_space import TextSpace, lit_text_space, own_text_space
from .train import TrainConfig, train_segmenter

__all__ = [
    "PanopticMap",
    "SegmentClasses",
    "SegmentConfig",
    "Segmenter",
    "SegmenterConfig",
    "TextSpace",
    "TrainConfig",
    "class_iou",
    "class_quality",
    "confusion",
    "lit_text_space",
    "load_segmenter",
    "mean_iou",
    "measure_segmentation",
    "own_text_space",
    "panoptic_counts",
    "panoptic_map",
    "panoptic_quality",
    "pixel_counts",
    "save_segmenter",
    "segmentation_table",
    "train_segmenter",
]
