"""Stage 0b: packed rows are what they should be, and a short run learns, resumes, and opens in plain transformers."""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from regiontower.mllm.boxes import box_format
from regiontower.train_stages.conversations import DEFAULT_MIX
from regiontower.train_stages.engine import StageInterrupted
from regiontower.train_stages.engine.run_log import LOG_FILE, LogRow, read_rows
from regiontower.train_stages.pretrain_lm import (
    LMDataConfig,
    LMModelConfig,
    LMRecipe,
    build_lm,
    lm_tokenizer,
    pretrain_lm,
    tokenizer_corpus,
)
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import write_records
from regiontower.train_stages.records import Record, Region
from regiontower.train_stages.text_packing import IGNORE, ConversationTexts, PackedTexts, collate_rows
from regiontower.train_stages.tokenizer import END_TOKEN, MARKERS
from regiontower.train_stages.train_config import TrainConfig
from regiontower.vision_towers.errors import UserError

TINY = LMModelConfig(hidden_size=48, layers=2, heads=4, kv_heads=2, intermediate_size=64, max_positions=512)
ROW = 256


def toy_records(count: int = 40) -> list[Record]:
    rng = random.Random(0)
    records = []
    for number in range(count):
        regions = []
        for kind in rng.sample(["star", "heart", "moon", "cup", "sign"], 3):
            x, y = rng.randrange(70), rng.randrange(70)
            color = rng.choice(["red", "blue", "green"])
            regions.append(
                Region(
                    box_xyxy=(x, y, x + rng.randrange(10, 30), y + rng.randrange(10, 30)),
                    category=kind,
                    texts=[kind, f"{color} {kind}"],
                    captions=[f"a {color} {kind}"],
                    tags=[kind, color],
                    ocr=rng.choice(["apple", "nurse", "river"]) if kind == "sign" else None,
                )
            )
        records.append(Record(image=f"{number}.png", width=100, height=100, absent=["black dog"], regions=regions))
    return records


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return toy_records()


@pytest.fixture(scope="module")
def records_file(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    write_records(path, records)
    return path


@pytest.fixture(scope="module")
def tokenizer(records):
    return lm_tokenizer(LMDataConfig(records="unused", vocab_size=600), records)


@pytest.fixture(scope="module")
def recipe(records_file) -> LMRecipe:
    return LMRecipe(
        data=LMDataConfig(records=str(records_file), sequence_length=ROW, turns=3, vocab_size=600),
        train=TrainConfig(steps=20, batch_size=4, save_steps=5, log_steps=1, threads=1),
        model=TINY,
        lr=5e-3,
    )


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    return run_dir, pretrain_lm(recipe, run_dir, device="cpu")


def conversations(tokenizer, **changes) -> ConversationTexts:
    options = {"turns": 3, "scene_text": 1.0, "max_regions": 12, "loss_on": "answers"} | changes
    return ConversationTexts(tokenizer, box_format("int1000"), DEFAULT_MIX, **options)


def test_documents_learn_answers_alone(tokenizer, records):
    document = conversations(tokenizer)(records[0], random.Random(1), 500)
    assert document is not None and len(document.ids) == len(document.labels)
    text = tokenizer.decode(document.ids)
    assert text.startswith("<|user|>[") and text.endswith("<|end|></s>")
    learned = tokenizer.decode([label for label in document.labels if label != IGNORE])
    answers = [turn.split("<|assistant|>")[1] for turn in text.split("<|user|>")[1:]]
    assert learned == "".join(answers).removesuffix("</s>")
    everything = conversations(tokenizer, loss_on="all")(records[0], random.Random(1), 500)
    assert everything is not None and everything.ids == everything.labels == document.ids


def test_scene_text_limits_and_large_records(tokenizer, records):
    without = conversations(tokenizer, scene_text=0.0)(records[0], random.Random(1), 500)
    assert without is not None and "\n" not in tokenizer.decode(without.ids)
    for limit in range(60, 300, 7):
        document = conversations(tokenizer)(records[0], random.Random(1), limit)
        if document is not None:
            assert len(document.ids) <= limit
            assert tokenizer.decode(document.ids).endswith("<|end|></s>")
            assert tokenizer.decode(document.ids).count("<|user|>") * 2 == document.ids.count(
                tokenizer.convert_tokens_to_ids(END_TOKEN)
            )
    assert conversations(tokenizer)(records[0], random.Random(1), 20) is None
    lines = [Region(box_xyxy=(0, i, 9, i + 1), ocr=f"line {i}") for i in range(60)]
    receipt = Record(image="r.png", width=100, height=100, regions=lines)
    document = conversations(tokenizer)(receipt, random.Random(0), 2000)
    assert document is not None and tokenizer.decode(document.ids).split("Read")[0].count("line") == 12
    assert conversations(tokenizer)(Record(image="r.png", width=9, height=9), random.Random(0), 99) is None


def test_rows_are_full_and_seeded(tokenizer, records):
    dataset = PackedTexts(records, conversations(tokenizer), 512)
    random.seed(5)
    rows = [dataset[index] for index in range(len(dataset))]
    random.seed(5)
    assert rows == [dataset[index] for index in range(len(dataset))]
    used = [sum(len(document.ids) for document in row) for row in rows]
    assert len(rows) == len(records) and max(used) <= 512
    assert sum(used) > 0.8 * 512 * len(rows)


def test_packed_documents_do_not_see_each_other(tokenizer, records):
    texts, rng = conversations(tokenizer), random.Random(0)
    documents = [document for record in records[:3] if (document := texts(record, rng, 200))]
    batch = collate_rows([documents, documents[:1]], 640, 0)
    model = build_lm(TINY, tokenizer).eval()
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        start = 0
        for document in documents:
            alone = model(torch.tensor([document.ids])).logits[0]
            torch.testing.assert_close(packed[0, start : start + len(alone)], alone, atol=1e-5, rtol=1e-5)
            start += len(alone)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 640)
    assert (batch["labels"][1, len(documents[0].ids) :] == IGNORE).all()
    all_tokens = collate_rows([[replace(d, labels=d.ids) for d in documents]], 640, 0)
    assert (all_tokens["labels"] != IGNORE).sum() == sum(len(d.ids) - 1 for d in documents), "a start was learned"


def test_nano_has_the_size_it_says(tokenizer):
    recipe = load_recipe("lm-nano", LMRecipe)
    vocab = recipe.data.vocab_size - len(tokenizer)
    size = build_lm(recipe.model, tokenizer).num_parameters() + vocab * recipe.model.hidden_size
    assert 3_000_000 <= size <= 4_000_000


def test_a_short_run_learns(run):
    run_dir, result = run
    assert result.steps == 20
    losses = [row.loss for row in read_rows(run_dir / LOG_FILE, LogRow)]
    assert len(losses) == 20 and losses[0] > 4.5
    assert max(losses[-4:]) < 0.75 * losses[0]
    assert {"recipe.yaml", "stage.json", "loss.png", "tokenizer.json", "model.safetensors"} <= set(os.listdir(run_dir))


def test_the_run_opens_in_plain_transformers(run):
    run_dir, _ = run
    code = (
        "import sys; sys.modules['regiontower'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(run_dir)!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(run_dir)!r})\n"
        "prompt = [{'role': 'user', 'content': '[10, 20, 30, 40] red star\\nWhere is red star?'}]\n"
        "ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=5).shape[1] - ids['input_ids'].shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=run_dir)
    assert 1 <= int(done.stdout) <= 5


def test_generation_ends_at_the_end_of_a_turn(run):
    run_dir, _ = run
    model: Any = AutoModelForCausalLM.from_pretrained(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(run_dir)
    end = tokenizer.convert_tokens_to_ids(END_TOKEN)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == end
    assert model.config.vocab_size == len(tokenizer) and model.config.use_cache
    assert tokenizer.convert_tokens_to_ids(list(MARKERS)) == [4, 5, 6, 7, 8]
    model.generation_config.suppress_tokens = [i for i in range(len(tokenizer)) if i != end]
    ids = tokenizer.encode("<|user|>Where?<|end|><|assistant|>", return_tensors="pt")
    assert model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :].tolist() == [end]


class StopAt(TrainerCallback):
    """Ctrl-C at a step; until then, what the packed rows rely on must hold."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        assert kwargs["model"].config.use_cache is False
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_resume_equals_the_straight_run(run, recipe, tmp_path):
    run_dir, result = run
    with pytest.raises(StageInterrupted):
        pretrain_lm(recipe, tmp_path, device="cpu", callbacks=[StopAt(7)])
    resumed = pretrain_lm(recipe, tmp_path, device="cpu")
    assert resumed.steps == 20 and resumed.final_loss == result.final_loss
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (run_dir / name).read_bytes()


def test_tokenizer_of_an_earlier_run_is_used(run, recipe, records):
    run_dir, _ = run
    data = replace(recipe.data, tokenizer=str(run_dir))
    assert lm_tokenizer(data, records).get_vocab() == AutoTokenizer.from_pretrained(run_dir).get_vocab()
    assert any("red star" in text for text in tokenizer_corpus(records))


def test_mistakes_are_one_sentence(recipe, records, tmp_path):
    with pytest.raises(UserError, match=r"data.*either records"):
        load_recipe("lm-nano", LMRecipe, ["data.records=x.jsonl"])
    with pytest.raises(UserError, match="kv_heads"):
        load_recipe("lm-nano", LMRecipe, ["model.heads=7"])
    with pytest.raises(UserError, match="No record gives a question"):
        pretrain_lm(replace(recipe, data=replace(recipe.data, mix={"point": 1.0})), tmp_path)
    with pytest.raises(UserError, match="sequence_length=32"):
        pretrain_lm(replace(recipe, data=replace(recipe.data, sequence_length=32)), tmp_path)
    with pytest.raises(UserError, match="1,000,000"):
        pretrain_lm(replace(recipe, data=LMDataConfig(scenes=2, scene_seed=999_999)), tmp_path)
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        lm_tokenizer(replace(recipe.data, tokenizer=str(tmp_path / "nowhere")), records)


def test_records_without_questions_are_counted(recipe, records, tmp_path, capfd):
    path = tmp_path / "records.jsonl"
    write_records(path, [*records, Record(image="empty.png", width=9, height=9)])
    train = TrainConfig(steps=1, batch_size=2, threads=1)
    pretrain_lm(replace(recipe, data=replace(recipe.data, records=str(path)), train=train), tmp_path / "run", "cpu")
    said = capfd.readouterr().err
    assert "41 records, 0 bad" in said and "1 of 41 records have nothing to ask about" in said


def test_scenes_are_generated_when_asked(recipe, tmp_path):
    data = LMDataConfig(scenes=4, sequence_length=ROW, vocab_size=600)
    result = pretrain_lm(
        replace(recipe, data=data, train=TrainConfig(steps=1, batch_size=2, threads=1)), tmp_path, device="cpu"
    )
    assert result.steps == 1
