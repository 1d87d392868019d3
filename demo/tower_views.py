"""What the tower sees, laid over the picture: where it looks like a region, and its tokens as colours.

Both are read from the features that a conversation keeps; the ViT does not run again.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..mllm import ChatSession
from ..mllm.boxes import Boxes, ImageFrame
from ..vision_towers import TowerFeatures, describe_tower

HEAT = 0.6  # how much of the heat-map's colours is laid over the picture


@torch.inference_mode()
def similarity_picture(
    chat: ChatSession, image: Image.Image, box_xyxy: tuple[float, float, float, float]
) -> Image.Image:
    """The picture, yellow where the tower's embedding of a small box is like that of `box_xyxy` (cosine), blue where it
    is not. The small boxes are three patches a side, one around every patch."""
    from ..eval.probe.pictures import cosine_to_first, heat_colours, patch_boxes

    spec = describe_tower(chat.model.config.vision)
    features = _whole_view(chat.features)
    asked, _ = chat.frame.to_input(Boxes([box_xyxy]))
    boxes = torch.cat([asked.tensor(), patch_boxes(features.grid_hw, spec.patch_size)])
    embeds = chat.model.model.vision_tower(features=features, boxes=boxes[None].to(chat.model.device)).region_embeds[0]
    colours = heat_colours(cosine_to_first(embeds).unflatten(0, features.grid_hw))
    return Image.blend(image, _onto(colours, chat.frame, image.size, Image.Resampling.BICUBIC), HEAT)


@torch.inference_mode()
def token_picture(chat: ChatSession, size: tuple[int, int]) -> Image.Image:
    """The tokens the language model reads, their three largest principal components as red, green and blue, at the
    places of their patches in a picture of `size` (width, height)."""
    from ..eval.probe.pictures import token_colours

    config = chat.model.config
    spec = describe_tower(config.vision)
    features = _whole_view(chat.features)
    layers = config.vision_feature_layer
    last = layers if isinstance(layers, int) else layers[-1]
    hidden = features.hidden[last % (config.vision.num_hidden_layers + 1)]
    colours = token_colours(hidden[:, min(1, spec.num_prefix_tokens) :])[0].unflatten(0, features.grid_hw)
    return _onto(colours.cpu().numpy(), chat.frame, size, Image.Resampling.NEAREST)


def _whole_view(features: TowerFeatures) -> TowerFeatures:
    """Of a picture that was cut into tiles, the view of the whole, which comes first."""
    return TowerFeatures(
        {layer: rows[:1] for layer, rows in features.hidden.items()}, features.grid_hw, features.input_hw
    )


def _onto(grid: np.ndarray, frame: ImageFrame, size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    """Colours of patches `(rows, columns, 3)` 0-1 at their places in the original; padding of the input is cut off."""
    small = Image.fromarray((grid * 255).round().astype(np.uint8))
    rows, columns = grid.shape[:2]
    left, top, right, bottom = frame.to_input(Boxes([(0, 0, *size)]))[0][0]
    across, down = columns / frame.input_size[0], rows / frame.input_size[1]
    return small.resize(size, how, box=(left * across, top * down, right * across, bottom * down))
