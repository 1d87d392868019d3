"""Every kind of model that an engine may be given, tiny and random, of its true class, against that class itself."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize
from transformers import (
    AutoModelForMaskGeneration,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    Sam3ImageProcessor,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerProcessor,
    Sam3VideoConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from regiontower.train_stages.label.box_masks import BoxMasker
from regiontower.train_stages.label.clip_scores import ClipScorer
from regiontower.train_stages.label.detectors import Detector
from regiontower.train_stages.label.image_tags import Tagger
from regiontower.train_stages.label.labeller import Workplace
from regiontower.train_stages.label.proposals import mask_box, mask_proposals
from regiontower.train_stages.records import Record
from regiontower.vision_towers.errors import UserError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PLACE = Workplace()
DECODER = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
MAPS = {"fpn_hidden_size": 32, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "initializer_range": 0.3}
BOXES = [(10.0, 10.0, 80.0, 60.0), (0.0, 0.0, 120.0, 90.0)]


def sam2(folder):
    torch.manual_seed(0)
    hiera = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [64, 64],
        "window_positional_embedding_background_size": [2, 2],
        "num_query_pool_stages": 3,
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [4, 2, 2, 2],
        "global_attention_blocks": [3],
    }
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16}
    config = Sam2Config(
        vision_config={**MAPS, "backbone_config": hiera, "backbone_channel_list": [64, 32, 16, 8]},
        prompt_encoder_config=prompts,
        mask_decoder_config=DECODER,
        initializer_range=0.3,
    )
    Sam2Model(config).save_pretrained(folder)
    images = Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16})
    Sam2Processor(images, target_size=64).save_pretrained(folder)


def sam3_images():
    return Sam3ImageProcessor(size={"height": 56, "width": 56}, mask_size={"height": 16, "width": 16})


def sam3_tracker(folder):
    torch.manual_seed(0)
    vit = {
        **SIZES,
        "model_type": "sam3_vit_model",
        "image_size": 56,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": 28,
        "initializer_range": 0.3,
    }
    config = Sam3TrackerConfig(
        vision_config={**MAPS, "model_type": "sam3_vision_model", "backbone_config": vit},
        prompt_encoder_config={"hidden_size": 32, "image_size": 56, "patch_size": 14},
        mask_decoder_config=DECODER,
        initializer_range=0.3,
    )
    Sam3TrackerModel(config).save_pretrained(folder)
    Sam3TrackerProcessor(sam3_images(), target_size=56).save_pretrained(folder)


def sam3(folder):
    """The layout of SAM 3's checkpoint: detector, tracker and neck in one file, under the config of the video model."""
    sam3_tracker(folder / "tracker")
    model = Sam3TrackerModel.from_pretrained(folder / "tracker")
    prefixes = {
        "vision_encoder.backbone.": "detector_model.vision_encoder.backbone.",
        "vision_encoder.neck.": "tracker_neck.",
    }
    video = {"model_type": "sam3_tracker_video", "image_size": 56}
    weights = {}
    for name, value in model.state_dict().items():
        start = next((start for start in prefixes if name.startswith(start)), "")
        weights[prefixes.get(start, "tracker_model.") + name.removeprefix(start)] = value.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Sam3VideoConfig(tracker_config={**model.config.to_dict(), **video}).save_pretrained(folder)
    sam3_images().save_pretrained(folder)


@pytest.fixture(scope="module", params=[sam2, sam3_tracker, sam3], ids=lambda write: write.__name__)
def sam_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return folder


def test_masks_are_proposed(sam_dir, noise_image):
    """Every mask of the model at every point of the grid, those that overlap left out by the pipeline's own NMS."""
    image = noise_image(120, 90)
    record = Record(image="a.png", width=120, height=90)
    options = {"min_stability": -9.0, "points_per_side": 3, "points_per_batch": 4}
    found = mask_proposals(str(sam_dir), PLACE, min_iou=-9.0, **options)(image, record)
    assert found
    for region in found:
        inside = region.mask.to_array().astype(bool)
        assert inside.shape == (90, 120) and mask_box(inside) == region.box_xyxy
    best = max(region.score for region in found)
    assert mask_proposals(str(sam_dir), PLACE, min_iou=best + 1, **options)(image, record) == []


def test_boxes_get_their_masks(sam_dir, noise_image):
    """Both boxes at once, against the model asked for each alone."""
    image = noise_image(120, 90)
    masks = BoxMasker(str(sam_dir), PLACE)(image, BOXES)
    assert any(masks)
    model = AutoModelForMaskGeneration.from_pretrained(sam_dir).eval()
    kind = Sam2Processor if isinstance(model, Sam2Model) else Sam3TrackerProcessor
    processor = kind.from_pretrained(sam_dir)
    for box, mask in zip(BOXES, masks, strict=True):
        inputs = processor(images=image, input_boxes=[[list(box)]], return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        planes = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])[0][0]
        wanted = planes[outputs.iou_scores[0, 0].argmax()].numpy()
        if mask is None:
            assert not wanted.any()
        else:
            assert (mask.to_array() == wanted).mean() > 0.999


def test_siglips_cosines(tmp_path, noise_image, letter_tokenizer):
    """Texts padded to the full length, as it was trained: the pad's embeddings are part of the result."""
    torch.manual_seed(0)
    tokenizer = letter_tokenizer
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 48, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8})
    SiglipModel(config).save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    images, texts = [noise_image(80, 60, 0), noise_image(40, 90, 1)], ["a red car", "dog"]
    score = ClipScorer(str(tmp_path), PLACE)
    found = score.images(images) @ score.texts(texts).T
    model = SiglipModel.from_pretrained(tmp_path).eval()
    pixels = SiglipImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt")
    ids = tokenizer(texts, padding="max_length", max_length=48, return_tensors="pt").input_ids
    with torch.inference_mode():
        outputs = model(input_ids=ids, **pixels)
    wanted = normalize(outputs.image_embeds, dim=-1) @ normalize(outputs.text_embeds, dim=-1).T
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_owlvit(tmp_path, noise_image, letter_tokenizer, letter_text):
    """It squeezes the image into its square, OWLv2 pads."""
    torch.manual_seed(0)
    tokenizer = letter_tokenizer
    vision = {**SIZES, "image_size": 64, "patch_size": 16}
    config = OwlViTConfig(text_config=letter_text, vision_config=vision, projection_dim=32)
    model = OwlViTForObjectDetection(config)
    with torch.no_grad():
        for weight in model.box_head.parameters():
            weight *= 0.1  # or every box would lie on an edge
    model.save_pretrained(tmp_path)
    OwlViTProcessor(OwlViTImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(tmp_path)
    image = noise_image(120, 80)
    (found,) = Detector(str(tmp_path), PLACE, size=None, threshold=0.0, nms_iou=1.0)([image], [["cat", "a dog"]])
    model = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(images=[image], text=[["cat", "a dog"]], padding="max_length", return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    scores, labels = outputs.logits[0].sigmoid().max(dim=-1)
    middles, sides = outputs.pred_boxes[0].split(2, dim=-1)
    boxes = torch.cat([middles - sides / 2, middles + sides / 2], dim=-1) * torch.tensor([120, 80, 120, 80])
    boxes[:, 0::2].clamp_(0, 120)
    boxes[:, 1::2].clamp_(0, 80)
    assert len(found) > 4
    for each in found:
        place = (boxes - torch.tensor(each.box)).abs().amax(dim=1).argmin()
        np.testing.assert_allclose(each.box, boxes[place], atol=0.02)
        assert each.score == pytest.approx(float(scores[place]), abs=1e-3)
        assert each.text == ["cat", "a dog"][labels[place]]


def test_mm_grounding_dino(tmp_path, tiny_dino_dir, noise_image):
    """The same processor as Grounding DINO's; texts are told apart in the same way."""
    torch.manual_seed(0)
    known = AutoModelForZeroShotObjectDetection.from_pretrained(tiny_dino_dir).config.to_dict()
    known.pop("model_type")
    MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**known)).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_dino_dir).save_pretrained(tmp_path)
    images = [noise_image(120, 80), noise_image(60, 90, 1)]
    detect = Detector(str(tmp_path), PLACE, size=None, threshold=0.0, nms_iou=1.0)
    found = [
        detect([image], [texts])[0] for image, texts in zip(images, [["a red car", "the dog"], ["cat"]], strict=True)
    ]
    assert all(found) and {each.text for each in found[0]} <= {"a red car", "the dog"}
    assert {each.text for each in found[1]} == {"cat"}
    model = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path).eval()
    inputs = AutoProcessor.from_pretrained(tmp_path)(images=images[0], text="a red car. the dog.", return_tensors="pt")
    with torch.inference_mode():
        scores = model(**inputs).logits[0].sigmoid()
    of_texts = torch.stack([scores[:, 1:4].max(dim=1).values, scores[:, 5:7].max(dim=1).values], dim=1)
    wanted = [(float(row.max()), ["a red car", "the dog"][int(row.argmax())]) for row in of_texts]
    for each in found[0]:
        assert any(text == each.text and abs(score - each.score) < 2e-4 for score, text in wanted)


def test_a_model_that_tags(tmp_path, noise_image):
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "car", 3: "tree"}
    sizes = {**SIZES, "image_size": 32, "patch_size": 8, "initializer_range": 0.5}
    config = ViTConfig(**sizes, id2label=names, problem_type="multi_label_classification")
    ViTForImageClassification(config).save_pretrained(tmp_path / "tagger")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tagger")
    images = [noise_image(80, 60, seed) for seed in range(3)]
    model = ViTForImageClassification.from_pretrained(tmp_path / "tagger").eval()
    pixels = ViTImageProcessor.from_pretrained(tmp_path / "tagger")(images, return_tensors="pt")
    with torch.inference_mode():
        scores = model(**pixels).logits.sigmoid()
    middle = float(scores.median())
    found = Tagger(str(tmp_path / "tagger"), PLACE, middle, 2)(images)
    for tags, row in zip(found, scores, strict=True):
        likely = [names[int(place)] for place in row.argsort(descending=True) if row[place] >= middle]
        assert tags == likely[:2]
    assert any(found) and Tagger(str(tmp_path / "tagger"), PLACE, 1.01, 2)(images) == [[], [], []]
    ViTForImageClassification(ViTConfig(**sizes, id2label=names)).save_pretrained(tmp_path / "single")
    with pytest.raises(UserError, match="exclude each other"):
        Tagger(str(tmp_path / "single"), PLACE, 0.5, 2)


def test_half_precision(sam_dir, noise_image):
    """Of boxes and of a grid of points."""
    place, image = Workplace(dtype=torch.bfloat16), noise_image(120, 90)
    masks = BoxMasker(str(sam_dir), place)(image, BOXES)
    assert len(masks) == 2 and any(masks)
    options = {"min_iou": -9.0, "min_stability": -9.0, "points_per_side": 2, "points_per_batch": 4}
    assert mask_proposals(str(sam_dir), place, **options)(image, Record(image="a.png", width=120, height=90))
