"""CLOC's labels: detectors against their own models, the engine as a whole."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from regiontower.mllm.boxes import ImageFrame
from regiontower.train_stages.label import ImageSource, RunConfig, find_engine, label_images
from regiontower.train_stages.label.captioner import Captioner
from regiontower.train_stages.label.detectors import Detector
from regiontower.train_stages.label.labeller import Workplace
from regiontower.train_stages.label.statistics import label_statistics, read_shards
from regiontower.train_stages.label.vesl import VeslConfig
from regiontower.train_stages.pretrain_data import named_regions
from regiontower.train_stages.record_io import read_records, write_records
from regiontower.train_stages.records import Record, Region
from regiontower.vision_towers.errors import UserError

RUN = RunConfig(per_shard=2, batch_size=2, device="cpu", progress=False)


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [noise(120, 80, 0), noise(60, 90, 1), noise(50, 50, 2)]
TEXTS = [["a red car", "the dog", "cat"], [], ["dog."]]


def everything(found):
    return [(detection.text, detection.score, detection.box) for detection in found]


def test_owl_alone_and_in_a_batch_with_longer_lists(tiny_owl_dir):
    """Padded texts must not win, and must not change anything."""
    detect = Detector(str(tiny_owl_dir), Workplace(), size=96, threshold=0.0, nms_iou=1.0)
    together = detect(IMAGES, TEXTS)
    assert together[1] == []
    assert len(together[0]) > 10  # of 6 x 6 patches; boxes wholly in the padding are dropped
    for image, texts, found in zip(IMAGES, TEXTS, together, strict=True):
        (alone,) = detect([image], [texts])
        assert [text for text, _, _ in everything(alone)] == [text for text, _, _ in everything(found)]
        for one, other in zip(alone, found, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3)
            np.testing.assert_allclose(one.box, other.box, atol=0.05)
    assert {detection.text for detection in together[2]} == {"dog"}


def test_owl_boxes_are_in_pixels_of_the_image(tiny_owl_dir):
    """Against the model itself: its boxes are shares of the square that the image is padded to."""
    detect = Detector(str(tiny_owl_dir), Workplace(), size=None, threshold=0.0, nms_iou=1.0)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(tiny_owl_dir).eval()
    inputs = AutoProcessor.from_pretrained(tiny_owl_dir)(images=[IMAGES[0]], text=[["cat"]], return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    scores = outputs.logits[0].sigmoid().max(dim=-1).values
    middles, sides = outputs.pred_boxes[0].split(2, dim=-1)
    boxes = torch.cat([middles - sides / 2, middles + sides / 2], dim=-1) * 120
    boxes[:, 0::2].clamp_(0, 120)
    boxes[:, 1::2].clamp_(0, 80)
    best = scores.argmax()
    (found,) = detect([IMAGES[0]], [["cat"]])
    np.testing.assert_allclose(found[0].box, boxes[best], atol=0.02)
    assert found[0].score == pytest.approx(float(scores[best]), abs=1e-3)


def test_boxes_of_one_text_are_suppressed(tiny_owl_dir):
    loose = Detector(str(tiny_owl_dir), Workplace(), size=None, threshold=0.0, nms_iou=1.0)
    strict = Detector(str(tiny_owl_dir), Workplace(), size=None, threshold=0.0, nms_iou=0.0)
    many, few = loose(IMAGES[:1], [["cat"]])[0], strict(IMAGES[:1], [["cat"]])[0]
    assert 0 < len(few) < len(many) and few[0] == many[0]
    high = Detector(str(tiny_owl_dir), Workplace(), size=None, threshold=many[3].score, nms_iou=1.0)
    assert {each.score > many[3].score - 1e-3 for each in high(IMAGES[:1], [["cat"]])[0]} == {True}


def test_a_smaller_input_keeps_the_limit_of_its_longer_side(tiny_dino_dir):
    """64 and at most 96 px by itself."""
    for size, wanted in ((None, (2, 96)), (32, (1, 48))):
        detect = Detector(str(tiny_dino_dir), Workplace(), size=size, threshold=0.0, nms_iou=1.0)
        pixels = detect._images(images=noise(1920, 40, 0), return_tensors="pt")["pixel_values"]
        assert tuple(pixels.shape[-2:]) == wanted


def test_grounding_dino_scores_texts_by_their_tokens(tiny_dino_dir):
    detect = Detector(str(tiny_dino_dir), Workplace(), size=None, threshold=0.0, nms_iou=1.0)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(tiny_dino_dir).eval()
    processor = AutoProcessor.from_pretrained(tiny_dino_dir)
    inputs = processor(images=IMAGES[0], text="a red car. the dog. cat.", return_tensors="pt")
    with torch.inference_mode():
        scores = model(**inputs).logits[0].sigmoid()
    parts = slice(1, 4), slice(5, 7), slice(8, 9)  # [CLS] a red car . the dog . cat . [SEP]
    of_texts = torch.stack([scores[:, part].max(dim=1).values for part in parts], dim=1)
    names = ["a red car", "the dog", "cat"]
    wanted = [(float(row.max()), names[int(row.argmax())]) for row in of_texts]
    found = detect(IMAGES[:1], TEXTS[:1])[0]
    assert len(found) >= 6  # of 12; boxes outside of the image are dropped
    for each in found:
        assert any(text == each.text and abs(score - each.score) < 2e-4 for score, text in wanted)


@pytest.mark.parametrize("model", ["tiny_llava_dir", "tiny_mllm_dir"])
def test_captions_are_what_the_model_writes(model, request):
    """Two pictures at once and each alone; the prompt is not part of the caption."""
    write = Captioner(str(request.getfixturevalue(model)), Workplace(), "What is in it?", 8)
    together = write(IMAGES[:2])
    assert together == [write([image])[0] for image in IMAGES[:2]]
    assert all("What is in it" not in text for text in together) and any(together)
    assert write([]) == []


@pytest.fixture
def captioned(pictures, tmp_path):
    """Two pictures with captions, one without."""
    sentences = (["A red car and a dog."], ["The small cat.", "A tree."], [])
    records = [
        Record(
            image=f"{number}.png",
            width=520,
            height=460,
            captions=captions,
            absent=["a dog", "a zebra"],
            regions=[Region(box_xyxy=(0, 0, 9, 9), ocr="X")],
        )
        for number, captions in enumerate(sentences)
    ]
    write_records(tmp_path / "captioned.jsonl", records)
    return ImageSource(tmp_path / "captioned.jsonl", "records", pictures)


def test_vesl_of_records(captioned, tiny_owl_dir, tmp_path):
    pytest.importorskip("textblob")
    config = VeslConfig(str(tiny_owl_dir), detector_size=64, threshold=0.0, tagger="textblob")
    result = label_images(find_engine("vesl"), config, captioned, tmp_path / "out", RUN)
    records = [record for path in result.shards for record in read_records(path, check_images=True).records]
    assert result.passed_over == {"no caption": 1}
    assert [record.captions for record in records] == [["A red car and a dog."], ["The small cat.", "A tree."]]
    for record, allowed in zip(records, ({"a red car", "a dog"}, {"the small cat", "a tree"}), strict=True):
        assert record.regions[0].ocr == "X"
        texts = {text for region in record.regions[1:] for text in region.texts}
        assert texts and texts <= allowed
        assert all(region.score is not None and region.source for region in record.regions[1:])
        assert ("a dog" in record.absent) == ("a dog" not in texts)
        _, said = named_regions(record, ImageFrame.identity((record.width, record.height)))
        assert set(said) == {'"X"', *texts}  # what CLOC is trained on
    found = label_statistics(read_shards(result.shards))
    assert (found.images, found.regions) == (2, result.regions)
    assert found.image_tokens == pytest.approx((6 + 3 + 2) / 3)
    assert "regions per image" in found.table()


def test_vesl_with_a_captioner(pictures, tiny_llava_dir, tiny_owl_dir, tmp_path):
    pytest.importorskip("textblob")
    config = VeslConfig(
        str(tiny_owl_dir), str(tiny_llava_dir), detector_size=None, threshold=0.0, max_new_tokens=6, tagger="textblob"
    )
    result = label_images(find_engine("vesl"), config, ImageSource(pictures), tmp_path / "out", RUN)
    records = [record for path in result.shards for record in read_records(path).records]
    write = Captioner(str(tiny_llava_dir), Workplace(), config.prompt, 6)
    wanted = {f"{number}.png": write([Image.open(pictures / f"{number}.png")]) for number in range(3)}
    assert {record.image.rpartition("/")[2]: record.captions for record in records} == {
        name: captions for name, captions in wanted.items() if captions[0]
    }


def test_a_detector_without_texts_is_refused(captioned, tiny_detr_dir, tmp_path):
    pytest.importorskip("textblob")
    with pytest.raises(UserError, match="is a detr; a detector of phrases is needed: owlvit, owlv2"):
        label_images(find_engine("vesl"), VeslConfig(str(tiny_detr_dir)), captioned, tmp_path / "out", RUN)
