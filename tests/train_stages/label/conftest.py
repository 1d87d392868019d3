"""Tiny random models of the classes that label engines open."""

import pytest


@pytest.fixture(scope="session")
def tiny_sam_dir(tmp_path_factory):
    """A random SAM of 64 px."""
    import torch
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    torch.manual_seed(0)
    vision = SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        mlp_dim=32,
        window_size=4,
        num_pos_feats=8,
        global_attn_indexes=[1],
        initializer_range=0.3,
    )
    prompt = SamPromptEncoderConfig(
        hidden_size=16, image_size=64, patch_size=8, image_embedding_size=8, mask_input_channels=4
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16
    )
    parts = {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    folder = tmp_path_factory.mktemp("sam")
    SamModel(SamConfig(**{name: part.to_dict() for name, part in parts.items()})).save_pretrained(folder)
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    masks = {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    SamProcessor(SamImageProcessor(**sizes, **masks)).save_pretrained(folder)
    return folder


WORDS = ["a", "the", "red", "blue", "small", "car", "dog", "cat", "tree", "house"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip_tokenizer():
    """CLIP's, with letters for tokens."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz."
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=48, pad_token="<|endoftext|>")


def clip_text_fields(tokenizer):
    """Of a text config for it."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 48}
    return {**SIZES, **ids, **sizes, "pad_token_id": tokenizer.eos_token_id}


@pytest.fixture(scope="session")
def letter_tokenizer():
    return clip_tokenizer()


@pytest.fixture(scope="session")
def letter_text(letter_tokenizer):
    """Fields of a text config for it."""
    return clip_text_fields(letter_tokenizer)


@pytest.fixture(scope="session")
def tiny_owl_dir(tmp_path_factory):
    """A random OWLv2 of 64 px, patch 16."""
    import torch
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    vision = {**SIZES, "image_size": 64, "patch_size": 16}
    config = Owlv2Config(text_config=clip_text_fields(tokenizer), vision_config=vision, projection_dim=32)
    folder = tmp_path_factory.mktemp("owl")
    model = Owlv2ForObjectDetection(config)
    with torch.no_grad():
        for weight in model.box_head.parameters():
            weight *= 0.1  # or every box would lie on an edge
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory):
    """A random CLIP of 32 px."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=clip_text_fields(tokenizer), vision_config=vision, projection_dim=16)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dino_dir(tmp_path_factory):
    """A random Grounding DINO."""
    import torch
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    text = {**SIZES, "model_type": "bert", "vocab_size": len(tokens), "max_position_embeddings": 64}
    swin = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    widths = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = GroundingDinoConfig(
        backbone_config={**swin, "window_size": 2, "image_size": 64, "out_features": ["stage2", "stage3", "stage4"]},
        text_config=text,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=12,
        max_text_len=64,
        **widths,
    )
    folder = tmp_path_factory.mktemp("dino")
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_detr_dir(tmp_path_factory):
    """A random DETR of three classes."""
    import torch
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

    torch.manual_seed(0)
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    config = DetrConfig(
        backbone_config={**resnet, "layer_type": "basic", "out_features": ["stage2"]},
        use_timm_backbone=False,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=8,
        id2label={0: "cat", 1: "dog", 2: "car"},
    )
    folder = tmp_path_factory.mktemp("detr")
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llava_dir(tmp_path_factory):
    """A random native LLaVA of 32 px with a chat template."""
    import torch
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {**SIZES, "model_type": "llama", "vocab_size": len(tokenizer), "initializer_range": 0.5}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    config = LlavaConfig(
        vision_config={**SIZES, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
        text_config={**text, **ids, "num_key_value_heads": 2},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(**sizes),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template + "{% endfor %}{% endfor %}",
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def signs(tmp_path_factory):
    """Six pictures of a word each, named after it, and one that is broken: do not write there."""
    from PIL import Image, ImageDraw, ImageFont

    folder = tmp_path_factory.mktemp("signs")
    for word in ("HELLO", "WORLD", "TOWER", "RIVER", "HOUSE", "GREEN"):
        picture = Image.new("RGB", (200, 100), "white")
        ImageDraw.Draw(picture).text((30, 30), word, fill="black", font=ImageFont.load_default(30))
        picture.save(folder / f"{word}.png")
    whole = (folder / "HELLO.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="session")
def read_folder():
    """`read_folder(out)`: the bytes of every file in it, by name."""

    def read(out):
        return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}

    return read


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures of noise, 520 x 460 px."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (460, 520, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")
    return folder
