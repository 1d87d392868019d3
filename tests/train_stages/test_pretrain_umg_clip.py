"""Stage 0 of UMG-CLIP with the real engine: a new model, a finished run, and native pairs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    TrainerCallback,
)

from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.tokenizer import train_tokenizer
from regiontower.vision_towers import (
    RiceVisionConfig,
    RiceVisionModel,
    UmgClipModel,
    UmgClipVisionModel,
    load_tower,
    load_umg_clip,
)
from regiontower.vision_towers.errors import UserError

SMALL = [
    "model.size={hidden_size: 64, layers: 2, heads: 2, intermediate_size: 128, patch_size: 14, image_size: 56}",
    "model.umg_clip.text={embed_dim: 32, text_hidden: 32, text_layers: 1, text_heads: 2}",
    "model.umg_clip.loss.tag_negatives=10",
    "train.batch_size=12",
    "train.threads=1",
    "train.log_steps=5",
]
VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 generated scenes, a tokenizer of their captions, and one folder of decoded pixels for all runs."""
    root = tmp_path_factory.mktemp("data")
    records = write_scenes(root / "scenes", 24, seed=7, progress=False)
    captions = [caption for record in read_records(records).records for caption in record.captions]
    train_tokenizer(captions, root / "tokenizer", 512)
    return root


def recipe(data, *overrides):
    common = [
        f"data.records={data}/scenes/records.jsonl",
        f"data.tokenizer={data}/tokenizer",
        f"data.cache_dir={data}/pixels",
    ]
    return load_recipe("umg-clip-nano", PretrainRecipe, [*SMALL, *common, *overrides])


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return pretrain(recipe(data, "train.steps=30"), tmp_path_factory.mktemp("run"), device="cpu")


def test_it_reduces_its_loss_and_opens_whole_and_as_a_tower(run):
    log = losses(run.run_dir)
    assert log[-1] < 0.9 * log[0]
    levels = ("image", "region", "pixel")
    assert {f"{level}_{what}_top1" for level in levels for what in ("to_text", "tag")} <= set(run.metrics)
    tower = load_tower(run.run_dir)
    assert isinstance(tower, UmgClipVisionModel) and tower.config.pooling == "value"
    whole = UmgClipModel.from_pretrained(run.run_dir)
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in whole.vision_tower.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(run.run_dir)) == whole.config.text_config.vocab_size


def test_a_run_goes_on_whole_or_with_its_tower_alone(run, data, tmp_path):
    first = f"model.tower={run.run_dir}"
    kept = pretrain(recipe(data, "train.steps=1", first, "model.keep_heads=true", "lr.heads=0"), tmp_path / "kept")
    before, after = (load_file(folder / "model.safetensors") for folder in (run.run_dir, kept.run_dir))
    heads = {name for name in before if not name.startswith("vision_tower.tower.")}
    assert all(torch.equal(before[name], after[name]) for name in heads) and len(heads) > 10
    assert losses(kept.run_dir)[0] < losses(run.run_dir)[0]
    fresh = pretrain(recipe(data, "train.steps=1", first, "lr.tower=0"), tmp_path / "fresh")
    after = load_file(fresh.run_dir / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name not in heads)
    assert not torch.equal(before["text_projection.weight"], after["text_projection.weight"])


class StopAt(TrainerCallback):
    """A crash after a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_equal_to_the_bit_when_resumed(data, tmp_path):
    """The draw of tags goes on where the batches do."""
    wanted = recipe(data, "train.steps=4", "train.save_steps=2")
    pretrain(wanted, tmp_path / "straight", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        pretrain(wanted, tmp_path / "resumed", device="cpu", callbacks=[StopAt()])
    pretrain(wanted, tmp_path / "resumed", device="cpu")
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def pair(request, data, tmp_path_factory):
    """A random native pair in a folder, with the tokenizer of its texts."""
    folder = tmp_path_factory.mktemp(request.param)
    captions = [text for record in read_records(data / "scenes/records.jsonl").records for text in record.captions]
    words = sorted({word for text in captions for word in text.replace(",", " ,").split()})
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<pad>", "<begin>", "<end>", *words])}, "<pad>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = "<begin> $A <end>" if request.param == "clip" else "$A <end>"
    specials = [(token, inner.token_to_id(token)) for token in frame.split() if token != "$A"]
    inner.post_processor = processors.TemplateProcessing(frame, special_tokens=specials)
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    text = {
        "vocab_size": inner.get_vocab_size(), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    if request.param == "clip":
        model = CLIPModel(CLIPConfig(vision_config=VIT, text_config=text, projection_dim=24))
    else:
        model = SiglipModel(SiglipConfig(vision_config=VIT, text_config=text))
    model.save_pretrained(folder)
    return folder


def test_a_native_pair_is_trained_on_with_its_text_tower(pair, data, tmp_path):
    names = (f"model.tower={pair}", f"data.tokenizer={pair}")
    names += ("model.umg_clip.reduce_after=1", "model.umg_clip.reduce_to=0.25")
    kept = pretrain(recipe(data, *names, "train.steps=2", "model.keep_heads=true", "lr.heads=0"), tmp_path / "kept")
    start, end = load_umg_clip(pair), load_umg_clip(kept.run_dir)
    assert start.config.vision_config.pooling == end.config.vision_config.pooling
    assert (end.config.vision_config.reduce_after, end.vision_tower.config.reduce_to) == (1, 0.25)
    before, after = start.state_dict(), end.state_dict()
    frozen = {name for name in before if not name.startswith("vision_tower.tower.")}
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    # Without keep_heads its vision part alone, beside a new text tower of the recipe's size.
    fresh = pretrain(recipe(data, f"model.tower={pair}", "train.steps=1", "lr.tower=0"), tmp_path / "fresh")
    opened = load_umg_clip(fresh.run_dir)
    assert opened.config.text_config.hidden_size == 32 and opened.text_length is None
    tower = start.vision_tower.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in opened.vision_tower.state_dict().items())


def test_what_cannot_work_is_one_sentence(pair, data, run, tmp_path):
    def refused(sentence, *overrides):
        with pytest.raises(UserError, match=sentence):
            pretrain(recipe(data, "train.steps=1", *overrides), tmp_path / "run", device="cpu")

    refused(r"set data\.tokenizer", "data.tokenizer=null")
    refused("another vocabulary than data.tokenizer", f"model.tower={pair}", "model.keep_heads=true")
    refused("set model.tower to it", "model.keep_heads=true")
    refused("attention-pooling head", "model.umg_clip.pooling=map")
    refused("reduce_after must be 1 to 1", "model.umg_clip.reduce_after=2")
    RiceVisionModel(RiceVisionConfig(**VIT)).save_pretrained(tmp_path / "rice")
    refused("umg_clip, a clip or a siglip is needed", f"model.tower={tmp_path}/rice", "model.keep_heads=true")
