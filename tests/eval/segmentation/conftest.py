"""Squares of two colours on gray, with masks, and small towers with texts."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

WORDS = ["<pad>", "<begin>", "<unknown>", "<end>", "red", "green", "blue", "square", "background", "a"]
VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
TEXT = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """`{"clip": folder, "siglip": folder}`: random native pairs, with the tokenizer of their texts."""
    folders = {}
    for kind, frame in (("clip", "<begin> $A <end>"), ("siglip", "$A <end>")):
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unknown>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        specials = [(token, inner.token_to_id(token)) for token in frame.split() if token != "$A"]
        inner.post_processor = processors.TemplateProcessing(frame, special_tokens=specials)
        PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
        torch.manual_seed(0)
        if kind == "clip":
            model = CLIPModel(CLIPConfig(vision_config=VIT, text_config=TEXT, projection_dim=24))
        else:
            model = SiglipModel(SiglipConfig(vision_config=VIT, text_config=TEXT))
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        model.save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def open_space(pairs):
    """`open_space(kind)`: a fresh `TextSpace` of a pair."""
    from regiontower.eval.probe.text_side import open_with_texts
    from regiontower.eval.segmentation import own_text_space

    return lambda kind="clip": own_text_space(*open_with_texts(pairs[kind]))


@pytest.fixture(scope="session")
def masked_records(square_records):
    """`make(count, seed)`: the squares, each with its mask, in a file."""
    from regiontower.train_stages.masks import encode_mask
    from regiontower.train_stages.record_io import write_records
    from regiontower.train_stages.records import Mask

    def make(count: int, seed: int):
        records = square_records(count, seed)
        for number, record in enumerate(records.records):
            regions = []
            for region in record.regions:
                x0, y0, x1, y1 = map(int, region.box_xyxy)
                shape = np.zeros((56, 56), dtype=bool)
                shape[y0:y1, x0:x1] = True
                regions.append(region.model_copy(update={"mask": Mask(**encode_mask(shape))}))
            records.records[number] = record.model_copy(update={"regions": regions})
        write_records(records.path, records.records)
        return records

    return make
