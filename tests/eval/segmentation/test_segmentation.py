"""Training, tuning and measuring, from records to figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from regiontower.cli import app
from regiontower.eval.probe import LitConfig
from regiontower.eval.probe.prompts import class_texts
from regiontower.eval.segmentation import (
    SegmentClasses,
    SegmentConfig,
    Segmenter,
    SegmenterConfig,
    TrainConfig,
    load_segmenter,
    measure_segmentation,
    save_segmenter,
    segmentation_table,
    train_segmenter,
)
from regiontower.eval.segmentation.tuning import linear_maps, tune
from regiontower.train_stages.pixels import PixelCache
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel, UserError

TUNED = [("clip", "lora"), ("clip", "convpass"), ("siglip", "lora"), ("siglip", "convpass")]
FEW = TrainConfig(1, batch_size=4, lr=1e-2, tuning_lr=1e-2)


@pytest.fixture(scope="module")
def learnable(masked_records, open_space):
    """`(cache, classes, texts)` of a few squares."""
    records = masked_records(6, 1)
    classes = SegmentClasses.of(records.records, "tags", "background")
    texts = class_texts(open_space().texts, classes.names, ("{}",)).clone()
    return PixelCache.build(records, 56, progress=False), classes, texts


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, 3, 56, 56), dtype=np.uint8))


@pytest.mark.parametrize(("kind", "tuning"), TUNED)
def test_adapters_change_nothing_at_first_and_alone_learn(open_space, learnable, kind, tuning):
    cache, classes, _ = learnable
    plain, space = open_space(kind), open_space(kind)
    texts = class_texts(space.texts, classes.names, ("{}",)).clone()
    view = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = plain.tower(view, output_dense_features=True).dense_features
    before = {name: value.clone() for name, value in space.tower.state_dict().items()}
    config = SegmenterConfig("semantic", tuning, width=8, lora_rank=2, bottleneck=2)
    tuned = train_segmenter(space, config, cache, classes, range(4), texts, replace(FEW, steps=0))
    torch.testing.assert_close(tuned.tower(view, output_dense_features=True).dense_features, expected)
    names = {name for name in tuned.learned() if not name.startswith("head.")}
    assert names and all("lora_" in name or ".convpass." in name for name in names)

    space = open_space(kind)
    config = replace(config, width=16)
    # More than one step: what starts at 0 has hidden the gradient of what stands before it.
    tuned = train_segmenter(space, config, cache, classes, range(4), texts, replace(FEW, steps=3))
    after = {name.replace(".base_layer", ""): value for name, value in tuned.tower.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.random.fork_rng():
        torch.manual_seed(FEW.seed)
        fresh = Segmenter(open_space(kind), config).learned()
    still = [name for name, value in tuned.learned().items() if torch.equal(value, fresh[name])]
    assert not still


def test_lora_is_where_gradients_come(open_space):
    clip, siglip = open_space("clip").tower, open_space("siglip").tower
    names = linear_maps(clip)
    assert len(names) == 6 + 4 and "encoder.layers.1.self_attn.q_proj" not in names  # the value path
    assert len(linear_maps(siglip)) == 12 and not any("head" in name for name in linear_maps(siglip))
    tune(clip, "lora", lora_rank=2)
    clip(torch.randn(1, 3, 56, 56), output_dense_features=True).dense_features.sum().backward()
    adapters = {name: value for name, value in clip.named_parameters() if value.requires_grad}
    assert len(adapters) == 2 * len(names)
    assert all(value.grad is not None for value in adapters.values())


def test_without_tuning_the_tower_stays_out_of_the_gradient(open_space, learnable):
    model = Segmenter(open_space(), SegmenterConfig("panoptic", width=8, queries=3))
    found = model(pixels(), learnable[2])
    (found.masks.sum() + found.classes.sum()).backward()
    assert all(value.grad is None for value in model.tower.parameters())
    assert all(name.startswith("head.") for name in model.learned())


def test_held_out_classes_are_not_seen(open_space, learnable):
    """Neither their pixels nor their texts change what is learned."""
    cache, classes, texts = learnable
    learned = classes.numbers(["background", "red square"])
    config = SegmenterConfig("semantic", width=8)
    first = train_segmenter(open_space(), config, cache, classes, learned, texts, replace(FEW, steps=2))
    other = texts.clone()
    other[classes.numbers(["green square", "blue square"])] = 0.5
    again = train_segmenter(open_space(), config, cache, classes, learned, other, replace(FEW, steps=2))
    for name, value in first.learned().items():
        assert torch.equal(value, again.learned()[name]), name
    more = classes.numbers(["background", "blue square", "red square"])
    seen = train_segmenter(open_space(), config, cache, classes, more, texts, replace(FEW, steps=2))
    assert not torch.equal(first.head.residual.weight, seen.head.residual.weight)


@pytest.mark.parametrize(("task", "tuning"), [("semantic", "lora"), ("panoptic", "convpass")])
def test_what_was_learned_is_saved(open_space, learnable, tmp_path, task, tuning):
    cache, classes, texts = learnable
    config = SegmenterConfig(task, tuning, width=8, queries=5, lora_rank=2, bottleneck=2, min_score=0.0)
    made = train_segmenter(open_space(), config, cache, classes, range(4), texts, FEW)
    save_segmenter(made, tmp_path / "made.safetensors")
    opened = load_segmenter(open_space(), tmp_path / "made.safetensors")
    assert opened.config == config
    one, other = (model.segments(cache.pixels[0], cache.frames[0], texts, classes.stuff) for model in (made, opened))
    assert np.array_equal(one.segment, other.segment) and one.classes == other.classes
    with pytest.raises(UserError, match="of another tower"):
        load_segmenter(open_space("siglip"), tmp_path / "made.safetensors")
    like_it = open_space()
    next(like_it.tower.parameters()).data += 0.1  # of the same shapes
    with pytest.raises(UserError, match="of another tower"):
        load_segmenter(like_it, tmp_path / "made.safetensors")
    space = open_space()
    Segmenter(space, config)
    with pytest.raises(UserError, match="has been tuned already"):
        Segmenter(space, replace(config, tuning="none"))
    with pytest.raises(UserError, match="there is no file"):
        load_segmenter(open_space(), tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(UserError, match="no safetensors file"):
        load_segmenter(open_space(), tmp_path / "text.safetensors")


def measure(tower, records, task, tuning="none", steps=0, **fields):
    segmenter = SegmenterConfig(task, tuning, width=32, queries=8)
    train = TrainConfig(steps, batch_size=6, lr=1e-2, tuning_lr=1e-3)
    config = SegmentConfig(segmenter, train, labels="tags", **fields)
    return measure_segmentation(tower, records.path, records.path, config=config, device="cpu")


def test_a_semantic_head_learns_squares(pairs, masked_records):
    records = masked_records(6, 1)
    before = measure(pairs["clip"], records, "semantic", background="background")["figures"]
    results = measure(pairs["clip"], records, "semantic", "convpass", 60, background="background")
    after = results["figures"]
    assert after["miou"]["value"] > 0.8 > 0.4 > before["miou"]["value"]
    assert after["miou_constant"]["value"] < 0.25 and after["pixel_accuracy"]["value"] > 0.95
    low, high = after["miou"]["ci95"]
    assert low <= after["miou"]["value"] <= high and after["miou"]["classes"] == results["classes"] == 4
    assert set(results["by_class"]) == {"background", "red square", "green square", "blue square"}
    assert "miou_seen" not in after and "miou  " in segmentation_table(results)
    again = measure(pairs["clip"], records, "semantic", "convpass", 60, background="background")
    assert again == results


def test_a_panoptic_head_learns_squares(pairs, masked_records):
    results = measure(pairs["clip"], masked_records(6, 1), "panoptic", "lora", 120, background="background")
    found = results["figures"]
    assert found["pq"]["value"] > 0.6 and found["pq_stuff"]["classes"] == 1 and found["pq_things"]["classes"] == 3
    assert found["pq"]["value"] <= found["sq"]["value"] and found["pq"]["value"] <= found["rq"]["value"]


def test_a_vocabulary_has_classes_that_training_does_not_see(pairs, masked_records):
    results = measure(pairs["siglip"], masked_records(4, 2), "semantic", "lora", 3, held_out=("blue square",))
    found = results["figures"]
    assert found["miou_seen"]["classes"] == 2 and found["miou_unseen"]["classes"] == 1
    whole = (2 * found["miou_seen"]["value"] + found["miou_unseen"]["value"]) / 3
    assert found["miou"]["value"] == pytest.approx(whole)
    with pytest.raises(UserError, match="did you mean 'blue square'"):
        measure(pairs["clip"], masked_records(4, 2), "semantic", held_out=("blue squares",))


def test_scenes_have_all_that_is_needed(pairs, tmp_path):
    from regiontower.train_stages.scenes import write_scenes

    path = write_scenes(tmp_path / "scenes", 6, 0, progress=False)
    config = SegmentConfig(SegmenterConfig("panoptic", "lora", width=16), TrainConfig(2, batch_size=2))
    found = measure_segmentation(pairs["clip"], path, config=config, device="cpu", out=tmp_path / "out")
    assert found["test_images"] == 1 and found["figures"]["pq_things"]["classes"] >= 3
    assert Image.open(tmp_path / "out" / "segmentation.png").width == 3 * 288 + 12
    assert json.loads((tmp_path / "out" / "segmentation.json").read_text()) == found


@pytest.fixture(scope="module")
def rice_folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("rice")
    RiceVisionModel(RiceVisionConfig(**sizes, patch_size=14, image_size=56)).save_pretrained(folder)
    return folder


def test_a_tower_without_texts_is_given_some(rice_folder, pairs, masked_records):
    records = masked_records(5, 3)
    with pytest.raises(UserError, match="trained without texts"):
        measure(rice_folder, records, "semantic")
    config = SegmentConfig(
        SegmenterConfig("semantic", "convpass", width=8), TrainConfig(1), labels="tags", lit=LitConfig(2)
    )
    with pytest.raises(UserError, match="--tokenizer"):
        measure_segmentation(rice_folder, records.path, config=config, device="cpu")
    found = measure_segmentation(rice_folder, records.path, config=config, tokenizer=pairs["clip"], device="cpu")
    assert found["lit_steps"] == 2 and found["by_class"]
    again = measure_segmentation(rice_folder, records.path, config=config, tokenizer=pairs["clip"], device="cpu")
    assert again["figures"] == found["figures"]  # the same texts, the same head
    other = replace(config, lit=LitConfig(2, seed=1))
    changed = measure_segmentation(rice_folder, records.path, config=other, tokenizer=pairs["clip"], device="cpu")
    assert changed["figures"] != found["figures"]


def run(*arguments):
    return CliRunner().invoke(app, ["segment", *map(str, arguments), "--device", "cpu"])


def test_the_command_trains_and_writes(pairs, masked_records, tmp_path):
    data = masked_records(5, 4).path
    asked = (pairs["clip"], "--data", data, "--labels", "tags", "--held-out", "red square", "--out", tmp_path / "out")
    result = run(*asked, "--tuning", "lora", "--steps", 2, "--background", "background", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["steps"] == 2 and found["held_out"] == ["red square"] and "miou" in found["figures"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"segmentation.json", "segmentation.png", "segmenter.safetensors"}
    for wrong, sentence in (
        (("--task", "panoptic"), "has to learn what a mask is"),
        (("--tuning", "lora"), "is learned"),
        (("--task", "both"), "semantic, panoptic"),
    ):
        refused = run(*asked, *wrong)
        assert refused.exit_code == 1 and sentence in str(refused.exception)


def test_what_cannot_be_learned_is_one_sentence(open_space, learnable):
    cache, classes, texts = learnable
    void = replace(cache, records=[record.model_copy(update={"regions": []}) for record in cache.records])
    config = SegmenterConfig("panoptic", width=8, queries=1)
    with pytest.raises(UserError, match="could learn from"):
        train_segmenter(open_space(), config, void, classes, classes.numbers(["red square"]), texts, FEW)
    with pytest.raises(UserError, match="raise queries"):
        train_segmenter(open_space(), config, cache, classes, range(4), texts, FEW)
    with pytest.raises(UserError, match="0 steps or more"):
        TrainConfig(-1)
