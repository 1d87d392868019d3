"""Pixels -> image tokens -> region embeddings. Knows nothing of language models.

Importing this package registers our towers with `AutoConfig`, `AutoModel` and `AutoImageProcessor`.
"""

from .cloc_model import ClocConfig, ClocModel, ClocOutput
from .cloc_vision import ClocVisionConfig, ClocVisionModel, ClocVisionOutput
from .convpass import add_convpass, load_convpass, save_convpass
from .describe import TowerSpec, describe_tower, register_tower, registered_towers
from .errors import UserError
from .image_processor import tower_image_processor
from .lift import lift_tower, plain_tower
from .load import encode_regions, load_cloc, load_tower, load_umg_clip, pad_boxes
from .model_card import CardFacts, write_tower_card
from .outputs import TowerFeatures, TowerOutput
from .push import push_folder
from .register import register_all
from .remote_code import export_native, export_remote_code
from .resize import resize_tower
from .rice_config import RiceVisionConfig
from .rice_model import RiceVisionModel
from .rice_vit import encode_packed, load_rice_vit, merge_order, rice_vit_config, to_mlcd_state, to_rice_vit_state
from .roi_model import RoiVisionConfig, RoiVisionModel
from .umg_clip_model import UmgClipConfig, UmgClipModel, UmgClipOutput
from .umg_clip_vision import UmgClipVisionConfig, UmgClipVisionModel, UmgClipVisionOutput

register_all()

__all__ = [
    "CardFacts",
    "ClocConfig",
    "ClocModel",
    "ClocOutput",
    "ClocVisionConfig",
    "ClocVisionModel",
    "ClocVisionOutput",
    "RiceVisionConfig",
    "RiceVisionModel",
    "RoiVisionConfig",
    "RoiVisionModel",
    "TowerFeatures",
    "TowerOutput",
    "TowerSpec",
    "UmgClipConfig",
    "UmgClipModel",
    "UmgClipOutput",
    "UmgClipVisionConfig",
    "UmgClipVisionModel",
    "UmgClipVisionOutput",
    "UserError",
    "add_convpass",
    "describe_tower",
    "encode_packed",
    "encode_regions",
    "export_native",
    "export_remote_code",
    "lift_tower",
    "load_cloc",
    "load_convpass",
    "load_rice_vit",
    "load_tower",
    "load_umg_clip",
    "merge_order",
    "pad_boxes",
    "plain_tower",
    "push_folder",
    "register_tower",
    "registered_towers",
    "resize_tower",
    "rice_vit_config",
    "save_convpass",
    "to_mlcd_state",
    "to_rice_vit_state",
    "tower_image_processor",
    "write_tower_card",
]
