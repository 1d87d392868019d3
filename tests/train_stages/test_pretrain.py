"""Stage 0 from records to a run directory, with the real engine on a small tower."""

import json
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPTextModel,
    CLIPVisionModel,
    SiglipVisionModel,
    TrainerCallback,
)

from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records, write_records
from regiontower.train_stages.region_labels import open_tokenizer
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.tokenizer import train_tokenizer
from regiontower.vision_towers import ClocModel, ClocVisionModel, RiceVisionModel, describe_tower, load_tower
from regiontower.vision_towers.errors import UserError

SMALL = [
    "model.size={hidden_size: 64, layers: 2, heads: 2, intermediate_size: 128, patch_size: 14, image_size: 56}",
    "train.minutes=null",
    "train.batch_size=12",
    "train.threads=1",
    "train.log_steps=5",
    "data.regions_per_image=4",
    "data.object_labels=category",
]
# The recipes are the second part of a stage 0; here it starts from nothing.
NEW = ["model.tower=null", "model.keep_heads=false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 generated scenes, a tokenizer of their captions, another of as many tokens, and one folder of decoded pixels
    for all runs."""
    root = tmp_path_factory.mktemp("data")
    records = write_scenes(root / "scenes", 24, seed=7, progress=False)
    captions = [caption for record in read_records(records).records for caption in record.captions]
    train_tokenizer(captions, root / "tokenizer", 512)
    train_tokenizer([caption[::-1] for caption in captions], root / "other", 512)
    return root


def recipe(data, name, *overrides):
    common = [
        f"data.records={data}/scenes/records.jsonl",
        f"data.tokenizer={data}/tokenizer",
        f"data.cache_dir={data}/pixels",
    ]
    return load_recipe(name, PretrainRecipe, [*SMALL, *NEW, *common, *overrides])


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]


def weights(run_dir):
    return {
        f"{file.name}/{key}": value for file in run_dir.glob("*.safetensors") for key, value in load_file(file).items()
    }


@pytest.mark.parametrize("stream", [True, False])
def test_held_out_shards_are_refused_when_the_recipe_is_read(data, stream):
    with pytest.raises(UserError, match=r"^rice-nano\.yaml: eval: .*shards can only be streamed; give files"):
        recipe(data, "rice-nano", f"data.stream={stream}", "eval.records=held-out.tar", "eval.format=webdataset")


@pytest.fixture(scope="module")
def rice_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("rice")
    held_out = f"eval.records={data}/scenes/records.jsonl"
    return pretrain(recipe(data, "rice-nano", "train.steps=30", held_out), out, device="cpu")


def test_thirty_steps_of_rice_reduce_the_loss(rice_run):
    log = losses(rice_run.run_dir)
    assert rice_run.steps == 30
    assert log[-1] < 0.75 * log[0]
    assert {"object_loss", "object_top1", "ocr_loss", "ocr_top1"} <= set(rice_run.metrics)


def test_the_run_directory_opens_as_a_tower(rice_run):
    tower = load_tower(rice_run.run_dir)
    assert isinstance(tower, RiceVisionModel)
    assert describe_tower(tower.config).region_readout == "rice"
    assert tower.config.num_region_layers == 2
    size = AutoImageProcessor.from_pretrained(rice_run.run_dir).size
    assert (size["height"], size["width"]) == (56, 56)


def test_centres_and_class_names_lie_beside_the_tower(rice_run, data):
    centres = load_file(rice_run.run_dir / "centres.safetensors")
    labels = json.loads((rice_run.run_dir / "labels.json").read_text())
    categories = {r.category for record in read_records(data / "scenes/records.jsonl").records for r in record.regions}
    assert labels["names"] == sorted(categories - {None})
    assert labels["object_labels"] == "category"
    assert centres["object"].shape == (len(labels["names"]), 64)
    assert centres["ocr"].shape[1] == 64


def test_held_out_regions_are_classified_and_noted(rice_run, data):
    regions = [r for record in read_records(data / "scenes/records.jsonl").records for r in record.regions]
    assert rice_run.metrics["held_out_regions"] == sum(region.category is not None for region in regions)
    assert 0 < rice_run.metrics["held_out_object_top1"] <= 1
    stage = json.loads((rice_run.run_dir / "stage.json").read_text())
    assert stage["metrics"] == rice_run.metrics
    assert set(stage["data"]) == {"records", "tokenizer"}


class StopAt(TrainerCallback):
    """A crash after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_equal_to_the_bit_run_again_and_resumed(data, tmp_path):
    """With sampled negatives and cut positive sets, whose draws must go on where the checkpoint left them."""
    settings = ("train.steps=5", "train.save_steps=3", "model.rice.loss={sample_rate: 0.3, max_positives: 2}")
    wanted = recipe(data, "rice-nano", *settings)
    for name in ("straight", "again"):
        pretrain(wanted, tmp_path / name, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        pretrain(wanted, tmp_path / "resumed", device="cpu", callbacks=[StopAt(4)])
    pretrain(wanted, tmp_path / "resumed", device="cpu")
    assert same_weights(tmp_path / "straight", tmp_path / "again")
    assert same_weights(tmp_path / "straight", tmp_path / "resumed")
    other = recipe(data, "rice-nano", *settings, "train.seed=1")
    pretrain(other, tmp_path / "other", device="cpu")
    assert not same_weights(tmp_path / "straight", tmp_path / "other")


def test_training_goes_on_from_a_tower(rice_run, data, tmp_path):
    overrides = (f"model.tower={rice_run.run_dir}", "data.tokenizer=null", "lr.tower=0", "train.steps=2")
    result = pretrain(recipe(data, "rice-nano", *overrides), tmp_path / "next", device="cpu")
    before, after = load_tower(rice_run.run_dir).state_dict(), load_tower(result.run_dir).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)  # frozen by its learning rate
    assert "ocr" not in load_file(result.run_dir / "centres.safetensors")
    assert "tower" in json.loads((result.run_dir / "stage.json").read_text())["parents"]


def test_heads_go_on_with_their_tower(rice_run, data, tmp_path):
    """Frozen centres of the second run are those the first one left."""
    overrides = (f"model.tower={rice_run.run_dir}", "model.keep_heads=true", "lr.heads=0", "train.steps=2")
    result = pretrain(recipe(data, "rice-nano", *overrides), tmp_path / "next", device="cpu")
    before, after = (load_file(run.run_dir / "centres.safetensors") for run in (rice_run, result))
    assert set(before) == {"object", "ocr"} and all(torch.equal(before[name], after[name]) for name in before)


def test_heads_of_other_classes_or_another_objective_are_refused(rice_run, data, tmp_path):
    keep = (f"model.tower={rice_run.run_dir}", "model.keep_heads=true", "train.steps=1")
    with pytest.raises(UserError, match="other object classes"):
        pretrain(recipe(data, "rice-nano", *keep, "data.object_labels=tags"), tmp_path / "a", device="cpu")
    with pytest.raises(UserError, match="another objective"):
        pretrain(recipe(data, "clip-nano", *keep), tmp_path / "b", device="cpu")
    with pytest.raises(UserError, match="is a rice_vision_model; a cloc is needed"):
        pretrain(recipe(data, "cloc-nano", *keep), tmp_path / "c", device="cpu")
    with pytest.raises(UserError, match=r"set model\.tower"):
        pretrain(recipe(data, "rice-nano", "model.keep_heads=true", "train.steps=1"), tmp_path / "d", device="cpu")


def test_heads_of_another_tokenizer_are_refused_when_the_run_noted_it(rice_run, data, tmp_path):
    parent = copytree(rice_run.run_dir, tmp_path / "parent")
    keep = (f"model.tower={parent}", "model.keep_heads=true", "train.steps=1")
    assert len(open_tokenizer(data / "other")) == len(open_tokenizer(data / "tokenizer"))  # shapes do not tell
    other = recipe(data, "rice-nano", *keep, f"data.tokenizer={data}/other")
    with pytest.raises(UserError, match=r"another vocabulary than data\.tokenizer has"):
        pretrain(other, tmp_path / "run", device="cpu")
    (parent / "stage.json").unlink()
    pretrain(other, tmp_path / "run", device="cpu")


def test_small_zoomed_views_train_too(data, tmp_path):
    for name in ("rice-nano-zoom", "clip-nano-zoom"):
        small = ("model.clip={embed_dim: 32, text_hidden: 32, text_layers: 1, text_heads: 2}", "data.view=28")
        result = pretrain(recipe(data, name, *small, "train.steps=12"), tmp_path / name, device="cpu")
        log = losses(result.run_dir)
        assert log[-1] < log[0]


def test_clip_reduces_its_loss_and_opens_as_a_tower(data, tmp_path):
    small_text = "model.clip={embed_dim: 32, text_hidden: 32, text_layers: 1, text_heads: 2}"
    wanted = recipe(data, "clip-nano", "train.steps=30", small_text, "lr.tower=3e-3", "lr.heads=3e-3")
    result = pretrain(wanted, tmp_path / "clip", device="cpu")
    log = losses(result.run_dir)
    assert log[-1] < log[0]
    assert isinstance(load_tower(result.run_dir), RiceVisionModel)
    text = CLIPTextModel.from_pretrained(result.run_dir / "text_tower")
    assert text.config.hidden_size == 32
    heads = load_file(result.run_dir / "clip_heads.safetensors")
    assert heads["image_projection"].shape == (32, 64)

    keep = (f"model.tower={result.run_dir}", "model.keep_heads=true", "lr.heads=0", "train.steps=1", small_text)
    again = pretrain(recipe(data, "clip-nano", *keep), tmp_path / "again", device="cpu")
    assert all(torch.equal(load_file(again.run_dir / "clip_heads.safetensors")[name], heads[name]) for name in heads)
    for name, tensor in CLIPTextModel.from_pretrained(again.run_dir / "text_tower").state_dict().items():
        assert torch.equal(tensor, text.state_dict()[name]), name
    with pytest.raises(UserError, match=r"model\.clip\.text_heads comes to 4, .* set model\.clip\.text_heads=2"):
        pretrain(recipe(data, "clip-nano", *keep, "model.clip.text_heads=4"), tmp_path / "other", device="cpu")
    with pytest.raises(UserError, match="another vocabulary"):
        pretrain(recipe(data, "clip-nano", *keep, f"data.tokenizer={data}/other"), tmp_path / "other", device="cpu")


@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [
        ("rice-nano", "data.side=50", r"data\.side is 50, it must be a multiple of the tower's patch size 14"),
        ("rice-nano", "data.view=50", r"data\.view is 50, it must be a multiple of the tower's patch size 14"),
        ("clip-nano", "data.tokenizer=null", r"set data\.tokenizer"),
        ("rice-nano", "data.object_labels=cluster", "has a cluster"),
    ],
)
def test_what_cannot_work_is_one_sentence(data, tmp_path, name, override, sentence):
    with pytest.raises(UserError, match=sentence):
        pretrain(recipe(data, name, "train.steps=1", override), tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.size.hidden_size=90", "multiple of 4 x heads"),
        ("model.size.image_size=60", "multiple of patch_size 14"),
        ("model.clip.text_heads=5", "model.clip: text_heads is 5, it must divide text_hidden, 192"),
        ("model.clip.max_tokens=1", "model.clip: max_tokens is 1, it must be at least 2"),
        ("model.cloc.text.text_layers=0", "model.cloc.text: text_layers is 0"),
        ("model.umg_clip.text.embed_dim=0", "model.umg_clip.text: embed_dim is 0"),
        ("model.rice.loss.sample_rate=2", "sample_rate"),
        ("model.rice.loss.margins=0.3", r"model\.rice\.loss\.margin\?"),
        ("data.augment.min_scale=0", "min_scale"),
    ],
)
def test_wrong_recipes_name_the_key(data, override, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe(data, "rice-nano", "train.steps=1", override)


@pytest.mark.parametrize(("kind", "objective"), [(CLIPVisionModel, "clip-nano"), (SiglipVisionModel, "cloc-nano")])
def test_a_tower_s_own_size_is_taken_though_it_is_no_multiple_of_the_patch(data, tmp_path, kind, objective):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind(kind.config_class(**sizes, image_size=60, patch_size=14)).save_pretrained(tmp_path / "vit")
    wanted = ("train.steps=1", f"model.tower={tmp_path}/vit")
    result = pretrain(recipe(data, objective, *wanted), tmp_path / "run", device="cpu")
    assert describe_tower(load_tower(result.run_dir).config).image_size == 60
    with pytest.raises(UserError, match=r"data\.view is 28, but this tower takes 60 px images only"):
        pretrain(recipe(data, objective, *wanted, "data.view=28"), tmp_path / "other", device="cpu")


@pytest.mark.parametrize("objective", ["clip-nano", "cloc-nano"])
def test_held_out_captions_have_a_loss_and_no_neighbours(data, tmp_path, objective):
    from regiontower.eval.probe import neighbours_during

    captions = [
        record.model_copy(update={"regions": [], "image": str(data / "scenes" / record.image)})
        for record in read_records(data / "scenes/records.jsonl").records
    ]
    write_records(tmp_path / "captions.jsonl", captions)
    held_out = ("train.steps=1", f"eval.records={tmp_path}/captions.jsonl")
    wanted = recipe(data, objective, *held_out, "data.captions=image")
    result = pretrain(wanted, tmp_path / "run", device="cpu", probe=neighbours_during("category"))
    assert result.metrics["held_out_loss"] > 0 and "held_out_knn_top1" not in result.metrics
    if objective == "clip-nano":
        with pytest.raises(UserError, match=r"eval\.records: no region of the records has words"):
            pretrain(recipe(data, objective, *held_out, "data.captions=visible"), tmp_path / "other", device="cpu")


def test_the_packaged_recipes_ask_for_their_data_alone():
    for name in ("rice-nano", "clip-nano", "rice-nano-zoom", "clip-nano-zoom", "cloc-nano", "umg-clip-nano"):
        with pytest.raises(UserError, match=r"data(\.records)? is missing"):
            load_recipe(name, PretrainRecipe)
        assert load_recipe(name, PretrainRecipe, ["data.records=x"]).model.size.hidden_size == 192


def test_cloc_reduces_its_loss_and_opens_whole_and_as_a_tower(data, tmp_path):
    run = pretrain(recipe(data, "cloc-nano", "train.steps=30", "model.cloc.text.text_layers=1"), tmp_path / "run")
    log = losses(run.run_dir)
    assert log[-1] < 0.9 * log[0]
    assert {"image_to_text_top1", "region_to_text_top1", "text_box_error"} <= set(run.metrics)
    tower = load_tower(run.run_dir)
    assert isinstance(tower, ClocVisionModel) and tower.prompter.add_token_pos  # its ViT is rotary
    whole = ClocModel.from_pretrained(run.run_dir)
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in whole.vision_tower.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(run.run_dir)) == whole.config.text_config.vocab_size

    goes_on = ["train.steps=1", f"model.tower={run.run_dir}", "model.keep_heads=true", "model.cloc.text.text_layers=1"]
    second = pretrain(recipe(data, "cloc-nano", *goes_on), tmp_path / "second")
    assert losses(second.run_dir)[0] < log[0]
    for keep, key, value in (
        (True, "prompter_pool", "all"),
        (True, "region_pool", "roi_align"),
        (True, "add_token_pos", "false"),
        (True, "text.text_layers", "2"),
        (True, "text.max_tokens", "32"),
        (True, "text.embed_dim", "64"),
        (False, "prompter_heads", "2"),  # the tower's Prompter is kept without its text tower, too
        (False, "text.embed_dim", "64"),
    ):
        other = [*goes_on, f"model.keep_heads={str(keep).lower()}", f"model.cloc.{key}={value}"]
        with pytest.raises(UserError, match=rf"model\.cloc\.{key} comes to {value}, .* set model\.cloc\.{key}="):
            pretrain(recipe(data, "cloc-nano", *other), tmp_path / "third")
    with pytest.raises(UserError, match="another vocabulary"):
        pretrain(recipe(data, "cloc-nano", *goes_on, f"data.tokenizer={data}/other"), tmp_path / "third")
    another_text_tower = ("model.keep_heads=false", "model.cloc.text.text_layers=2", f"data.tokenizer={data}/other")
    pretrain(recipe(data, "cloc-nano", *goes_on, *another_text_tower), tmp_path / "third")
