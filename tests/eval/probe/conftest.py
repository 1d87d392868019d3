"""Small towers, and one of them with texts."""

import pytest
import torch
from transformers import CLIPTextConfig

from regiontower.vision_towers import ClocConfig, ClocModel, ClocVisionModel, RiceVisionConfig, RiceVisionModel


@pytest.fixture(scope="session")
def rice_tower() -> RiceVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    return RiceVisionModel(RiceVisionConfig(**sizes, patch_size=8, image_size=56, initializer_range=0.1)).eval()


@pytest.fixture(scope="session")
def cloc_folder(rice_tower, tiny_tokenizer, tmp_path_factory):
    """A `ClocModel` as `pretrain` leaves it."""
    from regiontower.vision_towers import tower_image_processor

    torch.manual_seed(1)
    tower = ClocVisionModel.from_native(rice_tower.to_native(), projection_dim=24)
    text = CLIPTextConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, eos_token_id=tiny_tokenizer.eos_token_id,
    )  # fmt: skip
    model = ClocModel(ClocConfig(vision_config=tower.config, text_config=text))
    model.vision_tower.load_state_dict(tower.state_dict())
    folder = tmp_path_factory.mktemp("cloc")
    model.save_pretrained(folder)
    tower_image_processor(model.vision_tower.config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
