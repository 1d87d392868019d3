"""Small towers, and one of them with texts."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from regiontower.vision_towers import ClocConfig, ClocModel, ClocVisionModel, RiceVisionConfig, RiceVisionModel

# CLIP's pooling looks for the end token otherwise where its id is 2.
WORDS = ["<pad>", "<begin>", "<unknown>", "<end>", "red", "green", "blue", "square", "a", "much", "longer", "text"]
VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
TEXT = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip


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


@pytest.fixture(scope="session", params=["clip", "siglip"])
def pair(request, tmp_path_factory):
    """A random native pair, with the tokenizer of its texts, in a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = "<begin> $A <end>" if request.param == "clip" else "$A <end>"
    specials = [(token, inner.token_to_id(token)) for token in frame.split() if token != "$A"]
    inner.post_processor = processors.TemplateProcessing(frame, special_tokens=specials)
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    if request.param == "clip":
        model = CLIPModel(CLIPConfig(vision_config=VIT, text_config=TEXT, projection_dim=24))
    else:
        model = SiglipModel(SiglipConfig(vision_config=VIT, text_config=TEXT))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return request.param, folder


@pytest.fixture(scope="session")
def masked(squares):
    """Squares, the first of each picture with a mask: the left half of its box."""
    from regiontower.train_stages.masks import encode_mask
    from regiontower.train_stages.records import Mask

    cache = squares(5, 8)
    for number, record in enumerate(cache.records):
        x0, y0, _, y1 = map(int, record.regions[0].box_xyxy)
        shape = np.zeros((56, 56), dtype=bool)
        shape[y0:y1, x0 : x0 + 8] = True
        region = record.regions[0].model_copy(update={"mask": Mask(**encode_mask(shape))})
        cache.records[number] = record.model_copy(update={"regions": [region, record.regions[1]]})
    return cache
