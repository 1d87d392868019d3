"""What a tower's regions are worth by themselves, before any language model."""

from .coco_box import CocoBoxConfig, classify_coco_boxes, coco_box_table
from .detection import DetectConfig
from .during import neighbours_during
from .lit import LitConfig
from .prompts import read_templates
from .run import ProbeConfig, probe, probe_table

__all__ = [
    "CocoBoxConfig",
    "DetectConfig",
    "LitConfig",
    "ProbeConfig",
    "classify_coco_boxes",
    "coco_box_table",
    "neighbours_during",
    "probe",
    "probe_table",
    "read_templates",
]
