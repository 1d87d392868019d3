"""Captioners of kinds that take their pictures in different ways, tiny and random, beside the models themselves."""

import pytest
import torch
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
)

from regiontower.train_stages.label.captioner import Captioner
from regiontower.train_stages.label.labeller import Workplace

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
PLACE = Workplace()


@pytest.fixture
def images(noise_image):
    return [noise_image(80, 60, 0), noise_image(40, 90, 1)]


def test_a_captioner_without_a_chat_template(tmp_path, images):
    """BLIP captions unasked, and does not repeat a prompt."""
    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "red", "car", "dog", "tree", "house", "sky"]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**SIZES, **ids, "vocab_size": len(tokens), "encoder_hidden_size": 32, "initializer_range": 0.5}
    config = BlipConfig(text_config=text, vision_config=VISION)
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
    write = Captioner(str(tmp_path), PLACE, "Unasked.", 6)
    found = write(images)
    assert found == [write([image])[0] for image in images] and any(found)
    model = BlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    pixels = BlipImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        written = model.generate(pixel_values=pixels, max_new_tokens=6, do_sample=False)
    wanted = [" ".join(text.split()) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    assert found == wanted


def test_blip2_captions_unasked_and_its_image_tokens_are_not_said(tmp_path, images):
    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "red", "car", "dog", "tree", "house", "sky"]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {
        "model_type": "opt",
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "init_std": 0.5,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    qformer = {**SIZES, "vocab_size": len(tokens), "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    config = Blip2Config(
        vision_config=VISION, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=5
    )
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    sizes = BlipImageProcessor(size={"height": 32, "width": 32})
    Blip2Processor(sizes, tokenizer, num_query_tokens=4).save_pretrained(tmp_path)
    write = Captioner(str(tmp_path), PLACE, "Unasked.", 6)
    found = write(images)
    assert found == [write([image])[0] for image in images] and any(found)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    pixels = BlipImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        written = model.generate(pixel_values=pixels, max_new_tokens=6, do_sample=False)
    words = [[tokens[place] for place in row[-6:] if place > 5] for row in written.tolist()]
    assert [text.split() for text in found] == words


def test_gemma3_has_a_list_of_pictures_for_each_prompt_and_one_first_token(tmp_path, images, letter_tokenizer):
    """Its template writes the first token, its tokenizer would write it once more."""
    torch.manual_seed(0)
    letter_tokenizer.save_pretrained(tmp_path / "tokenizer")
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = type(letter_tokenizer).from_pretrained(tmp_path / "tokenizer", extra_special_tokens=named)
    image, begin, end = tokenizer.convert_tokens_to_ids(list(named.values()))
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer), "initializer_range": 0.5}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    config = Gemma3Config(
        text_config={**text, **ids},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    template = (
        "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<start_of_image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}), tokenizer, chat_template=template, image_seq_length=4
    )
    processor.save_pretrained(tmp_path)
    write = Captioner(str(tmp_path), PLACE, "what is in it", 6)
    found = write(images)
    assert found == [write([image])[0] for image in images] and any(found)
    asked = write._inputs(images)["input_ids"]
    assert (asked == tokenizer.bos_token_id).sum(dim=1).tolist() == [1, 1]
    assert (asked == image).sum(dim=1).tolist() == [4, 4]
