"""What lmms-eval's entry point group `lmms_eval.models` finds: the model id `regiontower`.

This file imports nothing heavy and never raises: one broken plug-in makes lmms-eval drop every later one.
"""

from typing import Any

MODEL_ID = "regiontower"


def manifests() -> list[Any]:
    """The manifest of our two classes; an empty list when this lmms-eval has no manifests."""
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError:
        return []
    chat, simple = "regiontower.eval.lmms_model.RegionTowerChat", "regiontower.eval.lmms_simple.RegionTowerSimple"
    return [ModelManifest(model_id=MODEL_ID, chat_class_path=chat, simple_class_path=simple)]
