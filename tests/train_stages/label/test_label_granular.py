"""UMG-CLIP's labels: each filter, and each part against the model that it asks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import (
    CLIPModel,
    CLIPProcessor,
    SamModel,
    SamProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from regiontower.train_stages.label import ImageSource, RunConfig, find_engine, granular, label_images
from regiontower.train_stages.label.box_masks import BoxMasker
from regiontower.train_stages.label.captioner import Captioner
from regiontower.train_stages.label.clip_scores import ClipScorer
from regiontower.train_stages.label.detectors import Detector
from regiontower.train_stages.label.granular import GranularConfig
from regiontower.train_stages.label.image_tags import Tagger
from regiontower.train_stages.label.labeller import Workplace
from regiontower.train_stages.masks import decode_mask
from regiontower.train_stages.record_io import read_records, write_records
from regiontower.train_stages.records import Record
from regiontower.vision_towers.errors import UserError

RUN = RunConfig(per_shard=2, batch_size=3, device="cpu", progress=False)
TAGS = ["car", "dog", "cat", "tree", "house"]


@pytest.fixture
def tags(tmp_path):
    path = tmp_path / "tags.txt"
    path.write_text("\n".join([*TAGS, "", "car"]) + "\n")
    return str(path)


def test_cosines_are_clips_own(tiny_clip_dir, noise_image):
    images, texts = [noise_image(80, 60, 0), noise_image(40, 90, 1)], ["a red car", "dog"]
    score = ClipScorer(str(tiny_clip_dir), Workplace())
    found = score.images(images) @ score.texts(texts).T
    model, processor = CLIPModel.from_pretrained(tiny_clip_dir).eval(), CLIPProcessor.from_pretrained(tiny_clip_dir)
    with torch.inference_mode():
        outputs = model(**processor(images=images, text=texts, return_tensors="pt", padding=True))
    wanted = normalize(outputs.image_embeds, dim=-1) @ normalize(outputs.text_embeds, dim=-1).T
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_best_mask_of_a_box(tiny_sam_dir, noise_image):
    image, boxes = noise_image(120, 90), [(10.0, 10.0, 80.0, 60.0), (0.0, 0.0, 120.0, 90.0)]
    masks = BoxMasker(str(tiny_sam_dir), Workplace())(image, boxes)
    model, processor = SamModel.from_pretrained(tiny_sam_dir).eval(), SamProcessor.from_pretrained(tiny_sam_dir)
    for box, mask in zip(boxes, masks, strict=True):
        inputs = processor(image, input_boxes=[[list(box)]], return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        planes = processor.image_processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], reshaped_input_sizes=inputs["reshaped_input_sizes"]
        )[0][0]
        wanted = planes[outputs.iou_scores[0, 0].argmax()].numpy()
        if mask is None:
            assert not wanted.any()
        else:
            assert (decode_mask(mask.size, mask.counts) == wanted).mean() > 0.999


def settings(scorer, detector, tags, **choices):
    return GranularConfig(str(scorer), str(detector), tags, min_tag_score=-1, min_caption_score=-1, **choices)


def run(config, source, out):
    result = label_images(find_engine("granular"), config, source, out, RUN)
    return result, [record for path in result.shards for record in read_records(path, check_images=True).records]


def test_all_levels(pictures, tags, tiny_clip_dir, tiny_owl_dir, tiny_mllm_dir, tiny_sam_dir, tmp_path):
    """Everything on: tags, captions, boxes of tags, captions and masks of boxes."""
    config = settings(
        tiny_clip_dir,
        tiny_owl_dir,
        tags,
        captioner=str(tiny_mllm_dir),
        mask_model=str(tiny_sam_dir),
        max_tags=2,
        max_new_tokens=4,
        min_box_score=0.0,
        nms_iou=0.5,
        max_aspect=20,
        box_min_area=50,
    )
    result, records = run(config, ImageSource(pictures), tmp_path / "out")
    assert records and result.bad == []
    score = ClipScorer(str(tiny_clip_dir), Workplace())
    of_tags = score.texts([f"a photo of a {tag}" for tag in TAGS])
    for record in records:
        image = Image.open(tmp_path / "out" / record.image)
        order = (score.images([image]) @ of_tags.T)[0].argsort(descending=True)[:2]
        assert record.tags == [TAGS[index] for index in order]
        assert record.regions
        for region in record.regions:
            assert region.category in record.tags and region.tags == [region.category]
            assert region.mask is None or decode_mask(region.mask.size, region.mask.counts).shape == (460, 520)
    assert any(region.mask for record in records for region in record.regions)
    assert any(record.captions for record in records)
    assert any(region.captions for record in records for region in record.regions)
    (facts,) = json.loads((tmp_path / "out" / "labels.json").read_text()).values()
    assert set(facts["models"]) == {"scorer", "detector", "captioner", "masks"}
    assert facts["tags"]["count"] == 5


def test_classes_of_a_detr(pictures, tags, tiny_clip_dir, tiny_detr_dir, tmp_path):
    detect = Detector(str(tiny_detr_dir), Workplace(), size=None, threshold=0.0, nms_iou=0.9)
    config = settings(
        tiny_clip_dir, tiny_detr_dir, tags, min_box_score=0.0, nms_iou=0.9, max_aspect=1.5, box_min_area=9000
    )
    result, _ = run(config, ImageSource(pictures), tmp_path / "out")
    kept = 0
    for number in range(3):
        for found in detect([Image.open(pictures / f"{number}.png")])[0]:
            assert found.text in ("cat", "dog", "car")
            width, height = found.box[2] - found.box[0], found.box[3] - found.box[1]
            kept += width * height > 9000 and max(width, height) <= 1.5 * min(width, height)
    assert result.regions == kept
    assert result.records + result.passed_over.get("no region", 0) == 3


def test_captions_that_do_not_fit_are_dropped(pictures, tags, tiny_clip_dir, tiny_detr_dir, tmp_path):
    """The threshold lies between the cosines of two captions."""
    captions = ["a red car", "the small yellow house with a tree"]
    score = ClipScorer(str(tiny_clip_dir), Workplace())
    image = Image.open(pictures / "0.png")
    cosines = (score.texts(captions) @ score.images([image])[0]).tolist()
    assert abs(cosines[0] - cosines[1]) > 1e-4
    write_records(tmp_path / "records.jsonl", [Record(image="0.png", width=520, height=460, captions=captions)])
    config = GranularConfig(
        str(tiny_clip_dir),
        str(tiny_detr_dir),
        tags,
        min_tag_score=2,
        min_caption_score=float(np.mean(cosines)),
        min_box_score=0.0,
        max_aspect=1000,
        box_min_area=0,
    )
    _, records = run(config, ImageSource(tmp_path / "records.jsonl", "records", pictures), tmp_path / "out")
    assert [record.captions for record in records] == [[captions[int(np.argmax(cosines))]]]
    assert records[0].tags == []


def test_images_are_filtered(tags, tiny_clip_dir, tiny_detr_dir, tmp_path):
    """Short side above 448, and neither side more than three times the other."""
    folder = tmp_path / "sizes"
    folder.mkdir()
    for width, height in ((449, 449), (448, 900), (1400, 460)):
        Image.new("RGB", (width, height)).save(folder / f"{width}.png")
    config = settings(tiny_clip_dir, tiny_detr_dir, tags, min_box_score=0.0, box_min_area=0)
    result, _ = run(config, ImageSource(folder), tmp_path / "out")
    assert result.passed_over["image too small or too long"] == 2


def test_only_images_that_stay_are_captioned(pictures, tags, tiny_clip_dir, tiny_detr_dir, tiny_llava_dir, tmp_path):
    asked = []

    class Asked(Captioner):
        def __call__(self, images):
            asked.append(len(images))
            return super().__call__(images)

    choices = {"min_box_score": 0.0, "max_aspect": 1000, "captioner": str(tiny_llava_dir), "max_new_tokens": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(granular, "Captioner", Asked)
        for area in (10**9, 0):
            config = settings(tiny_clip_dir, tiny_detr_dir, tags, box_min_area=area, **choices)
            result, _ = run(config, ImageSource(pictures), tmp_path / str(area))
            assert (result.records, sum(asked) > 0) == ((0, False) if area else (3, True))


def test_tags_of_a_model(pictures, tags, tiny_clip_dir, tiny_detr_dir, tmp_path):
    """Without a list; its tags are those of the images, and it is named."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {0: "cat", 1: "dog", 2: "car"}
    vit = ViTConfig(**sizes, image_size=32, patch_size=8, id2label=names, problem_type="multi_label_classification")
    ViTForImageClassification(vit).save_pretrained(tmp_path / "tagger")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tagger")
    choices = {"min_box_score": 0.0, "max_aspect": 1000, "box_min_area": 0, "min_tag_probability": 0.0, "max_tags": 2}
    config = settings(tiny_clip_dir, tiny_detr_dir, None, tag_model=str(tmp_path / "tagger"), **choices)
    _, records = run(config, ImageSource(pictures), tmp_path / "out")
    tag = Tagger(str(tmp_path / "tagger"), Workplace(), 0.0, 2)
    assert records
    for record in records:
        assert [record.tags] == tag([Image.open(tmp_path / "out" / record.image)]) and len(record.tags) == 2
    (facts,) = json.loads((tmp_path / "out" / "labels.json").read_text()).values()
    assert facts["models"]["tags"]["revision"].startswith("sha256:") and "tags" in facts["writes"]
    both = settings(tiny_clip_dir, tiny_detr_dir, tags, tag_model=str(tmp_path / "tagger"))
    with pytest.raises(UserError, match="either --tags or --tag-model"):
        run(both, ImageSource(pictures), tmp_path / "both")


def test_a_tag_list_is_needed(pictures, tiny_clip_dir, tiny_detr_dir, tmp_path):
    with pytest.raises(UserError, match="no such file of tags"):
        run(settings(tiny_clip_dir, tiny_detr_dir, str(tmp_path / "none")), ImageSource(pictures), tmp_path / "out")
