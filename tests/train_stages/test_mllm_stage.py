"""Stages 1 and 2 on generated scenes, with tiny models."""

import json
import os
import random
import signal
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from regiontower.mllm import Question, answer_questions, load_mllm
from regiontower.mllm.boxes import Boxes
from regiontower.train_stages import mllm_data
from regiontower.train_stages.chat_stream import Windows
from regiontower.train_stages.engine import StageInterrupted
from regiontower.train_stages.mixture import open_mixture
from regiontower.train_stages.mixture_recipe import MixtureSource
from regiontower.train_stages.mllm_data import ConversationDataset, collate_samples
from regiontower.train_stages.mllm_stage import AlignRecipe, InstructRecipe, align, instruct
from regiontower.train_stages.recipe import load_recipe, packaged_recipes
from regiontower.train_stages.record_io import read_records, write_records
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers import UserError, load_tower

TRAIN = {"steps": 6, "batch_size": 4, "threads": 1, "log_steps": 1, "save_steps": 3}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 12, 0, preset="easy", progress=False)


def align_recipe(scenes, tiny_parents, **train) -> AlignRecipe:
    model = {"tower": str(tiny_parents / "tower"), "language_model": str(tiny_parents / "lm")}
    data = {"records": str(scenes), "turns": 3, "mix": {"classify": 1, "grounding": 1}, "batches": "decoded"}
    return load_recipe({"model": model, "data": data, "train": TRAIN | train}, AlignRecipe)


@pytest.fixture(scope="module")
def aligned(scenes, tiny_parents, tmp_path_factory):
    return align(align_recipe(scenes, tiny_parents), tmp_path_factory.mktemp("runs") / "align", device="cpu")


def test_align_moves_the_projectors_and_nothing_else(aligned, tiny_parents):
    assert aligned.steps == 6
    model, processor = load_mllm(aligned.run_dir)
    tower, lm = load_tower(tiny_parents / "tower"), AutoModelForCausalLM.from_pretrained(tiny_parents / "lm")
    for name, tensor in tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], tensor), name
    stage = json.loads((aligned.run_dir / "stage.json").read_text())
    trainable = {row["part"]: row["trainable"] for row in stage["parts"]}
    assert trainable["tower"] == trainable["language_model"] == 0
    assert trainable["projector"] > 0 and trainable["region_projector"] > 0
    assert set(stage["parents"]) == {"tower", "language_model"} and stage["status"] == "finished"
    for file in ("loss.png", "recipe.yaml", "log.jsonl", "processor_config.json"):
        assert (aligned.run_dir / file).is_file(), file
    picture = np.zeros((80, 100, 3), dtype=np.uint8)
    questions = [Question(Image.fromarray(picture), "Name <region>.", [(1, 1, 50, 50)])]
    assert len(answer_questions(model, processor, questions, max_new_tokens=4)) == 1


def test_instruct_goes_on_from_align_and_learns(aligned, scenes, tmp_path):
    recipe = {
        "model": {"mllm": str(aligned.run_dir)},
        "data": {"records": str(scenes), "turns": 3},
        "lr": {"projector": 1e-3, "region_projector": 1e-3, "language_model": 3e-3},
        "train": TRAIN | {"steps": 25, "save_steps": 100},
    }
    result = instruct(load_recipe(recipe, InstructRecipe), tmp_path / "instruct", device="cpu")
    losses = [json.loads(line)["loss"] for line in (result.run_dir / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    before = load_file(aligned.run_dir / "model.safetensors")
    after = load_file(result.run_dir / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("vision_tower" in name for name in moved)


def test_a_resumed_run_equals_the_straight_one(aligned, scenes, tiny_parents, tmp_path):
    class StopAtFour(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe, run_dir = align_recipe(scenes, tiny_parents), tmp_path / "align"
    with pytest.raises(StageInterrupted):
        align(recipe, run_dir, device="cpu", callbacks=[StopAtFour()])
    assert json.loads((run_dir / "stage.json").read_text())["status"] == "interrupted"
    result = align(recipe, run_dir, device="cpu")
    straight, resumed = (
        load_file(aligned.run_dir / "model.safetensors"),
        load_file(result.run_dir / "model.safetensors"),
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_batch_says_the_truth(scenes, tiny_mllm):
    """Boxes of a batch lie on the objects that its text speaks of."""
    _, processor = tiny_mllm
    records = read_records(scenes)
    dataset = ConversationDataset(records, processor, {"classify": 1}, turns=2, max_tokens=500, cache_dir=None)
    assert dataset.summary == "12 records, 0 bad"
    random.seed(0)
    samples = [dataset[index] for index in range(4)]
    batch = collate_samples(samples, processor=processor)
    assert batch["region_counts"].tolist() == [len(sample.boxes) for sample in samples]
    for row, record in enumerate(records.records[:4]):
        frame = processor.frame((record.width, record.height))
        text = processor.tokenizer.decode([t for t in batch["labels"][row].tolist() if t >= 0])
        answers = text.split("<|end|>")[:-1]
        for box, answer in zip(batch["boxes"][row].tolist(), answers, strict=False):
            original = frame.to_original(Boxes([box]))
            overlaps = Boxes([region.box_xyxy for region in record.regions]).iou(original)[:, 0]
            assert overlaps.max() > 0.98 and record.regions[int(overlaps.argmax())].category == answer
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    padding = torch.arange(batch["labels"].shape[1])[None] >= lengths[:, None]
    assert padding.any() and (batch["labels"][padding] == -100).all()
    assert (batch["input_ids"][padding] == processor.tokenizer.pad_token_id).all()


@torch.no_grad()
def test_padding_changes_no_answer(scenes, tiny_mllm):
    """The batch has no attention mask: what stands behind a conversation must not reach it."""
    model, processor = tiny_mllm
    dataset = ConversationDataset(
        read_records(scenes), processor, {"classify": 1, "grounding": 1}, turns=3, max_tokens=500, cache_dir=None
    )
    random.seed(0)
    samples = [dataset[index] for index in range(4)]
    together = model.eval()(**collate_samples(samples, processor=processor)).logits
    for row, sample in zip(together, samples, strict=True):
        alone = model(**collate_samples([sample], processor=processor)).logits[0]
        torch.testing.assert_close(row[: len(sample.ids)], alone, rtol=1e-4, atol=1e-5)


def test_records_without_a_question_are_counted_and_none_at_all_is_refused(scenes, tiny_mllm, tmp_path):
    _, processor = tiny_mllm
    records = read_records(scenes)
    bare = records.records[0].model_copy(update={"regions": [], "points": [], "absent": [], "captions": []})
    path = tmp_path / "records.jsonl"
    (tmp_path / "images").symlink_to(scenes.parent / "images")
    write_records(path, [bare, *records.records[1:]])
    options = {"turns": 2, "max_tokens": 500, "cache_dir": None}
    dataset = ConversationDataset(read_records(path), processor, {"classify": 1}, **options)
    assert len(dataset) == 11 and "1 with nothing to ask about" in dataset.summary
    write_records(path, [bare])
    with pytest.raises(UserError, match=r"no record of .* gives a question"):
        ConversationDataset(read_records(path), processor, {"classify": 1}, **options)


def test_a_question_that_is_too_long_is_drawn_again(scenes, tiny_mllm, monkeypatch):
    """One of them must not end a run of days."""
    mix = {"classify": 1.0, "listing": 1.0}

    def lengths(max_tokens):
        options = {"turns": 1, "max_tokens": max_tokens, "cache_dir": None}
        dataset = ConversationDataset(read_records(scenes), tiny_mllm[1], mix, **options)
        random.seed(0)
        return [len(dataset[index].ids) for _ in range(4) for index in range(12)]

    short, long = min(lengths(500)), max(lengths(500))
    limit = (short + long) // 2
    assert max(lengths(limit)) <= limit < long
    with pytest.raises(UserError, match=r"6 of 12 records .* one turn takes \d+ tokens and max_tokens is"):
        lengths(short - 1)
    monkeypatch.setattr(mllm_data, "_DRAWS", 1)
    with pytest.raises(UserError, match="one turn takes"):
        lengths(limit)


def test_a_record_of_which_no_question_fits_makes_room_for_the_next(scenes, tiny_mllm, tmp_path):
    """In batches of both kinds; one record must not end a run of days."""
    records = read_records(scenes)
    wordy = records.records[3]
    regions = [region.model_copy(update={"category": "very " * 400 + "long"}) for region in wordy.regions]
    (tmp_path / "images").symlink_to(scenes.parent / "images")
    kept = [*records.records[:3], wordy.model_copy(update={"regions": regions}), *records.records[4:]]
    path = tmp_path / "records.jsonl"
    write_records(path, kept)
    options = {"turns": 1, "max_tokens": 300, "cache_dir": None}
    dataset = ConversationDataset(read_records(path), tiny_mllm[1], {"classify": 1.0}, **options)
    random.seed(0)
    assert np.array_equal(dataset[3].pixels, dataset[4].pixels)
    source = MixtureSource(str(path), mix={"classify": 1.0}, turns=1)
    windows = Windows(open_mixture([source], 0), tiny_mllm[1], 300, 12, 0)
    samples = list(windows.samples(0))
    assert samples.count(None) == 1 and len(windows.filled(0, samples)) == 12 and len(windows.tally.masked) == 1


def test_records_are_grouped_by_default_like_a_mixture_of_one(scenes, tiny_parents, tmp_path):
    """Grouped, packed and with kept features; decoded only when the recipe says so."""
    weights = {}
    for name, data in {
        "records": {"records": str(scenes), "turns": 3, "mix": {"classify": 1, "grounding": 1}, "max_tokens": 500},
        "sources": {
            "sources": [{"records": str(scenes), "turns": 3, "mix": {"classify": 1, "grounding": 1}}],
            "max_tokens": 500,
        },
    }.items():
        recipe = align_recipe(scenes, tiny_parents, steps=2)
        recipe = load_recipe({"model": asdict(recipe.model), "data": data, "train": TRAIN | {"steps": 2}}, AlignRecipe)
        run = align(recipe, tmp_path / name, device="cpu").run_dir
        assert not (run / "pixel_cache").exists()
        weights[name] = load_file(run / "model.safetensors")
    assert all(torch.equal(weights["records"][name], weights["sources"][name]) for name in weights["records"])
    align(align_recipe(scenes, tiny_parents, steps=2), tmp_path / "decoded", device="cpu")
    assert (tmp_path / "decoded" / "pixel_cache").is_dir()
    with pytest.raises(UserError, match="feature_cache needs other batches"):
        load_recipe(
            {"model": asdict(recipe.model), "train": TRAIN}
            | {"data": {"records": "r", "batches": "decoded", "feature_cache": "fp32"}},
            AlignRecipe,
        )


def test_kept_features_of_one_record_set(scenes, tiny_parents, tmp_path):
    recipe = align_recipe(scenes, tiny_parents)
    data = {"records": str(scenes), "turns": 3, "mix": {"classify": 1}, "batches": "packed", "feature_cache": "fp32"}
    recipe = load_recipe({"model": asdict(recipe.model), "data": data, "train": TRAIN | {"steps": 2}}, AlignRecipe)
    assert (align(recipe, tmp_path / "run", device="cpu").run_dir / "feature_cache").is_dir()


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if name.startswith(("align", "instruct"))])
def test_packaged_recipes_are_valid(name):
    load_recipe(name, AlignRecipe if name.startswith("align") else InstructRecipe)


def test_what_cannot_be_opened_is_one_sentence(scenes, tiny_parents, tmp_path):
    recipe = align_recipe(scenes, tiny_parents)
    for key in ("tower", "language_model"):
        broken = load_recipe(
            {
                "model": {
                    "tower": recipe.model.tower,
                    "language_model": recipe.model.language_model,
                    key: str(tmp_path),
                },
                "data": {"records": str(scenes)},
                "train": TRAIN,
            },
            AlignRecipe,
        )
        with pytest.raises(UserError) as error:
            align(broken, tmp_path / "run")
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_real_records_train_without_a_bad_or_lost_one(shared_data, tiny_parents, tmp_path):
    """The committed recipe reads photographs and receipts; every record is read, none is skipped without a word."""
    overrides = [
        f"data.root={shared_data}",
        f"model.tower={tiny_parents / 'tower'}",
        f"model.language_model={tiny_parents / 'lm'}",
        "train.steps=2",
        "train.epochs=null",
        "train.batch_size=4",
        "train.threads=1",
        "data.max_tokens=2000",
    ]
    recipe = load_recipe("align-real", AlignRecipe, overrides)
    records = recipe.data.read()
    assert len(records) == 178 + 130 and not records.bad
    assert align(recipe, tmp_path / "run", device="cpu").steps == 2
