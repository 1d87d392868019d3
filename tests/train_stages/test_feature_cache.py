"""Kept features are what the tower would give, are found by what they depend on, and survive crashes."""

import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from regiontower.benchmarks._tiny_llavas import tiny_llava, tiny_tower
from regiontower.mllm import add_regions, swap_vision_tower
from regiontower.train_stages import feature_cache
from regiontower.train_stages.chat_samples import encode, with_pixels
from regiontower.train_stages.feature_cache import (
    INDEX,
    FeatureCache,
    as_encoder_outputs,
    blank_shape,
    feature_key,
    fill,
    wanted_pictures,
)
from regiontower.train_stages.images import ImageError
from regiontower.train_stages.mixture import open_mixture
from regiontower.train_stages.mixture_recipe import MixtureSource
from regiontower.train_stages.mllm_data import collate_samples
from regiontower.train_stages.mllm_stage import AlignRecipe, InstructRecipe, align, instruct
from regiontower.train_stages.picture_file import PictureFile
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers import RiceVisionModel, UserError

CPU = torch.device("cpu")
COUNT = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    write_scenes(folder, COUNT, 0, progress=False)  # of the default preset: with points
    talk = [{"from": "human", "value": "Say five."}, {"from": "gpt", "value": "5"}]
    (folder / "text.jsonl").write_text("\n".join([json.dumps({"conversations": talk})] * 2))
    return folder


@pytest.fixture(scope="module")
def mixture(root):
    return open_mixture([MixtureSource(str(root / "records.jsonl"))], 0)


def filled(folder, model, processor, mixture, dtype="fp32", said=None):
    cache = FeatureCache(folder, dtype, *blank_shape(model, processor), model.config.region_dim)
    say = (lambda line: None) if said is None else said.append
    fill(cache, model, processor, wanted_pictures(mixture.everything(), processor), device=CPU, say=say)
    return cache


@pytest.fixture(scope="module")
def cache(tiny_mllm, mixture, tmp_path_factory):
    return filled(tmp_path_factory.mktemp("cache"), *tiny_mllm, mixture)


def encoded(mixture, processor, count=4, **choices):
    examples = [replace(example, most_turns=4, **choices) for example in mixture.everything()]
    return [encode(example, processor, 900, random.Random(n)) for n, example in enumerate(examples[:count])]


def learn(model, batch):
    """In training mode: where dummies have to run."""
    model.train().zero_grad()
    loss = model(**batch).loss
    loss.backward()
    model.eval()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


def both(model, processor, cache, samples):
    """The batch with its pictures, and the one with what is kept of them."""
    live = collate_samples([with_pixels(sample, processor) for sample in samples], processor=processor)
    kept = collate_samples([cache(sample) for sample in samples], processor=processor, pictures=cache.batch)
    assert "pixel_values" in live and "pixel_values" not in kept
    return live, as_encoder_outputs(kept, 0.0)


@pytest.mark.parametrize("choices", [{}, {"image_position": "sin2d"}, {"projector": "merge2x2_mlp"}])
def test_training_on_kept_features_is_training_on_the_pictures(make_tiny_mllm, mixture, tmp_path, choices):
    model, processor = make_tiny_mllm(**choices)
    model.model.vision_tower.requires_grad_(False)
    cache = filled(tmp_path, model, processor, mixture)
    live, kept = both(model, processor, cache, encoded(mixture, processor))
    assert live["region_counts"].sum() > 2
    (loss, grads), (kept_loss, kept_grads) = learn(model, live), learn(model, kept)
    torch.testing.assert_close(kept_loss, loss, rtol=1e-5, atol=1e-6)
    assert kept_grads.keys() == grads.keys()
    for name, gradient in grads.items():
        assert (kept_grads[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("without", ["regions", "pictures"])
def test_both_projectors_run_whatever_is_in_a_batch(tiny_mllm, mixture, root, cache, without):
    """Else processes wait for each other's gradients for ever."""
    model, processor = tiny_mllm
    if without == "regions":
        samples = encoded(mixture, processor, mix={"grounding": 1.0})
    else:
        text = open_mixture([MixtureSource(str(root / "text.jsonl"), format="conversations")], 0)
        samples = encoded(text, processor)
    assert not any(len(sample.boxes) for sample in samples)
    batch = collate_samples([cache(sample) for sample in samples], processor=processor, pictures=cache.batch)
    loss, grads = learn(model, as_encoder_outputs(batch, 0.0))
    names = [name for name, _ in model.named_parameters() if "projector" in name]
    assert torch.isfinite(loss) and set(names) <= set(grads)
    if without == "regions":
        live = collate_samples([with_pixels(sample, processor) for sample in samples], processor=processor)
        torch.testing.assert_close(loss, learn(model, live)[0], rtol=1e-5, atol=1e-6)


def test_the_tower_does_not_run_in_training(tiny_mllm, mixture, cache, monkeypatch):
    model, processor = tiny_mllm
    _, kept = both(model, processor, cache, encoded(mixture, processor))
    monkeypatch.setattr(RiceVisionModel, "forward", lambda *args, **kwargs: pytest.fail("the tower ran"))
    learn(model, kept)


def test_bf16_takes_half_the_room_and_is_near(tiny_mllm, mixture, cache, tmp_path):
    model, processor = tiny_mllm
    half = filled(tmp_path, model, processor, mixture, "bf16")
    assert (half.folder / "images.bin").stat().st_size * 2 == (cache.folder / "images.bin").stat().st_size
    for sample in encoded(mixture, processor):
        found, exact = half(sample).kept, cache(sample).kept
        assert found.image.dtype == torch.bfloat16
        torch.testing.assert_close(found.image.float(), exact.image, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found.regions.float(), exact.regions, rtol=1e-2, atol=1e-2)


def test_every_box_that_is_asked_about_is_kept(tiny_mllm, mixture, cache):
    _, processor = tiny_mllm
    boxes = 0
    for number, example in enumerate(mixture.everything()):
        for seed in range(20):
            sample = encode(replace(example, most_turns=8), processor, 2000, random.Random(100 * number + seed))
            boxes += len(sample.boxes)
            assert cache(sample).kept.regions.shape == (len(sample.boxes), cache.region_width)
    assert boxes > 200


def test_the_size_is_said_before_the_tower_runs(tiny_mllm, mixture, tmp_path, monkeypatch):
    model, processor = tiny_mllm
    said = []

    def stop(*arguments):
        assert len(said) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "_add", stop)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, model, processor, mixture, said=said)
    assert f"{COUNT} pictures x 64 tokens x 64 and" in said[0] and "kB in" in said[0] and "(0 of 6" in said[0]


def test_a_full_disk_is_said_first(tiny_mllm, mixture, tmp_path, monkeypatch):
    model, processor = tiny_mllm
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs .* kB and .* has 1 kB; set data\.cache_dir"):
        filled(tmp_path, model, processor, mixture)


def test_a_disk_that_fills_up_on_the_way_is_one_sentence(tiny_mllm, mixture, tmp_path):
    """By another process, or a quota: nobody could say it first."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    model, processor = tiny_mllm
    (tmp_path / "images.bin").symlink_to("/dev/full")
    with pytest.raises(UserError, match="a file could not be written") as error:
        filled(tmp_path, model, processor, mixture)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "images.bin").unlink()
    again = filled(tmp_path, model, processor, mixture)
    assert again.image_rows == COUNT


def test_a_broken_off_fill_goes_on(tiny_mllm, mixture, cache, tmp_path, monkeypatch):
    """Killed between two pictures, and in the middle of a line: what was kept stays, the rest comes."""
    model, processor = tiny_mllm
    monkeypatch.setattr(feature_cache, "_BATCH", 2)
    add, calls = feature_cache._add, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(feature_cache, "_add", dies)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, model, processor, mixture)
    with (tmp_path / INDEX).open("a") as file:
        file.write('{"image": "abc", "ro')
    (tmp_path / "images.bin").open("ab").write(b"half a row")
    said = []
    again = filled(tmp_path, model, processor, mixture, said=said)
    assert "(2 of 6 pictures are there already)" in said[0] and len(calls) == 2 + 2
    for sample in encoded(mixture, processor, COUNT):
        torch.testing.assert_close(again(sample).kept.image, cache(sample).kept.image, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(sample).kept.regions, cache(sample).kept.regions, rtol=1e-4, atol=1e-4)
    filled(tmp_path, model, processor, mixture, said=said)
    assert "0 pictures x" in said[1] and len(calls) == 4


def test_another_process_finds_what_the_first_has_kept_since(tiny_mllm, mixture, cache, tmp_path):
    """As when pictures have changed, and the mark of an earlier run says already that all are kept."""
    model, processor = tiny_mllm
    early = FeatureCache(tmp_path, "fp32", *blank_shape(model, processor), model.config.region_dim)
    filled(tmp_path, model, processor, mixture)
    half = '{"image": "abc", "ro'  # another process is just writing it
    with (tmp_path / INDEX).open("a") as file:
        file.write(half)
    for sample in encoded(mixture, processor, COUNT):
        torch.testing.assert_close(early(sample).kept.image, cache(sample).kept.image, rtol=1e-4, atol=1e-4)
    assert (tmp_path / INDEX).read_text().endswith(half)


def test_a_picture_that_changed_is_another_one(tiny_mllm, mixture, cache, root):
    _, processor = tiny_mllm
    (sample,) = encoded(mixture, processor, 1)
    other = replace(sample, picture=replace(sample.picture, path=None, data=b"other bytes"))
    with pytest.raises(ImageError, match="cannot be read"):
        cache(other)
    other_picture = Image.new("RGB", PictureFile("x", sample.picture.path).size())
    other_picture.save(data := io.BytesIO(), "PNG")
    other = replace(sample, picture=replace(sample.picture, path=None, data=data.getvalue()))
    with pytest.raises(ImageError, match=r"not in the feature cache .*; delete the folder"):
        cache(other)


@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_picture_that_cannot_be_read_is_said_so(tiny_mllm, root, tmp_path, damage):
    model, processor = tiny_mllm
    shutil.copytree(root, tmp_path / "scenes")
    mixture = open_mixture([MixtureSource(str(tmp_path / "scenes" / "records.jsonl"))], 0)
    sample, *others = encoded(mixture, processor, COUNT)
    path = sample.picture.path
    path.write_bytes(path.read_bytes()[:200])
    cache = filled(tmp_path / "cache", model, processor, mixture)
    assert cache.image_rows == COUNT - 1
    if damage == "gone":
        path.unlink()
    with pytest.raises(ImageError, match="cannot be read") as error:
        cache(sample)
    assert str(error.value).startswith(str(path)) and "delete" not in str(error.value)
    for other in others:
        assert cache(other).kept is not None


def test_the_key_holds_all_that_features_depend_on(make_tiny_mllm, tmp_path):
    model, processor = make_tiny_mllm()
    keys = [feature_key(model, processor, "fp32", "fp32")]
    assert keys[0] == feature_key(*make_tiny_mllm(), "fp32", "fp32")
    keys += [feature_key(model, processor, "bf16", "fp32"), feature_key(model, processor, "fp32", "bf16")]
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    keys.append(feature_key(model, processor, "fp32", "fp32"))
    model.config.vision_feature_layer = -1
    keys.append(feature_key(model, processor, "fp32", "fp32"))
    model.config.vision_config.num_region_layers = 1  # region rows are others, from the same weights
    keys.append(feature_key(model, processor, "fp32", "fp32"))
    model.config.vision_config._name_or_path = "elsewhere"
    assert feature_key(model, processor, "fp32", "fp32") == keys[-1]
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).view(-1)[0] += 1e-6
    keys.append(feature_key(model, processor, "fp32", "fp32"))
    folders = {key.folder(tmp_path) for key in keys}
    assert len(folders) == len(keys)


# ---- in a run ----


def recipe(root, tiny_parents, *overrides):
    return load_recipe(
        {
            "model": {"tower": str(tiny_parents / "tower"), "language_model": str(tiny_parents / "lm")},
            "data": {
                "sources": [{"records": str(root / "records.jsonl"), "turns": 3}],
                "batches": "packed",
                "row_tokens": 1200,
                "window": 8,
            },
            "train": {"steps": 4, "batch_size": 1, "threads": 1, "log_steps": 1, "optimizer": "sgd"},
        },
        AlignRecipe,
        overrides,
    )


def test_align_with_the_cache_ends_where_align_without_it_does(root, tiny_parents, tmp_path, capsys):
    runs = {}
    for choice in ("null", "fp32"):
        align(recipe(root, tiny_parents, f"data.feature_cache={choice}"), tmp_path / choice, device="cpu")
        runs[choice] = load_file(tmp_path / choice / "model.safetensors")
    assert "feature cache: 6 pictures x 64 tokens" in capsys.readouterr().err.replace("\n", " ")
    moved = 0
    for name, tensor in runs["null"].items():
        torch.testing.assert_close(runs["fp32"][name], tensor, rtol=1e-4, atol=1e-5)
        moved += "projector" in name
    assert moved and (tmp_path / "fp32" / "feature_cache").is_dir()


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("lr.tower=1e-4", "the tower is trained"),
        ("model.region_prompt=overlay", "boxes are drawn into each picture"),
        ("model.row_end=true", "different numbers of tokens"),
        ("model={mllm: TILED}", r"different numbers of tokens \(row ends, tiles\)"),
        ("data.sources=[{records: RECORDS, weight: 1, stream: true}]", "a source is streamed"),
    ],
)
def test_the_cache_is_refused_where_features_change(root, tiny_parents, tmp_path, override, why):
    if "TILED" in override:
        for part in add_regions(*swap_vision_tower(*tiny_llava("LlavaNext"), tiny_tower("RICE"))):
            part.save_pretrained(tmp_path / "tiled")
    override = override.replace("TILED", str(tmp_path / "tiled")).replace("RECORDS", str(root / "records.jsonl"))
    asked = recipe(root, tiny_parents, "data.feature_cache=bf16", "data.batches=plain", override)
    with pytest.raises(UserError, match=why) as error:
        align(asked, tmp_path / "run", device="cpu")
    assert "set data.feature_cache=null" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "feature_cache").exists()


def test_the_cache_is_refused_with_adapters_in_the_tower(root, tiny_mllm_dir, tmp_path):
    asked = load_recipe(
        {
            "model": {"mllm": str(tiny_mllm_dir)},
            "data": {"sources": [{"records": str(root / "records.jsonl")}], "feature_cache": "bf16"},
            "lr": {"tower": 0.0, "language_model": 0.0},
            "lora": {"rank": 2, "on": ["tower"]},
            "train": {"steps": 1, "threads": 1},
        },
        InstructRecipe,
    )
    with pytest.raises(UserError, match=r"the tower is trained.*set data\.feature_cache=null"):
        instruct(asked, tmp_path / "run", device="cpu")
