"""swap_checkpoint: files in, files out, proved.

A model with regions in a process of its own: `python -m pytest -n 0 -m slow tests/mllm/test_swap_on_disk.py`.
"""

import json
import multiprocessing
import sys
from subprocess import CompletedProcess

import pytest
import torch
from swapped_files import language_of, tensors_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from regiontower.benchmarks._tiny_llavas import KINDS, save_as, tiny_llava, tiny_tower
from regiontower.mllm import (
    Question,
    add_regions,
    answer_questions,
    load_mllm,
    swap_checkpoint,
    swap_vision_tower,
)
from regiontower.mllm.shard_files import read_header
from regiontower.mllm.swap_proof import answers_of, probe_inputs
from regiontower.mllm.swap_report import swap_table
from regiontower.vision_towers import ClocVisionModel, UmgClipVisionModel, load_tower


@pytest.fixture
def forked(monkeypatch):
    """What a fresh process would do is done by a forked one, which has imported everything already. Only for results
    that this package opens: it cannot be forgotten."""

    def run(command, **_):
        *_, code, folder, given, whose = command
        assert command[1] == "-c" and whose == "ours"

        def work():
            sys.argv = ["-c", folder, given, whose]
            exec(compile(code, "reader", "exec"), {"__name__": "__main__"})

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
        return CompletedProcess(command, child.exitcode, stderr="see above")

    if "fork" in multiprocessing.get_all_start_methods():
        monkeypatch.setattr("subprocess.run", run)


@pytest.mark.parametrize(("layout", "shards"), [("v4", 3), ("v5", 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_hold_the_swap_in_memory(kind, layout, shards, towers, tmp_path):
    source = save_as(*tiny_llava(kind, torch.bfloat16), tmp_path / "in", layout, shards)
    report = swap_checkpoint(source, towers["RICE"], tmp_path / "out", verify="bytes")
    before, after = language_of(source), language_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert report["proof"]["linked_files"] == shards - 1 and report["opens_in_plain_transformers"]

    loaded = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    expected, processor = swap_vision_tower(loaded, AutoProcessor.from_pretrained(source), load_tower(towers["RICE"]))
    found, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = probe_inputs(processor, expected)
    wanted, got = answers_of(expected, inputs), answers_of(found, inputs)
    assert torch.equal(wanted["logits"], got["logits"]) and torch.equal(wanted["ids"], got["ids"])
    again = probe_inputs(AutoProcessor.from_pretrained(tmp_path / "out"), found)
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert torch.equal(again["pixel_values"], inputs["pixel_values"])


def test_files_with_nothing_to_change_are_the_sources_own(llava, towers, tmp_path):
    swap_checkpoint(llava, towers["CLIP"], tmp_path / "out", verify="bytes")
    inodes = [
        sorted(path.stat().st_ino for path in folder.glob("*.safetensors")) for folder in (llava, tmp_path / "out")
    ]
    assert len(set(inodes[0]) & set(inodes[1])) == 2 and len(inodes[1]) == 4


def test_where_no_link_can_be_made_files_are_copied_and_proved(llava, towers, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError("another disk")

    monkeypatch.setattr("os.link", no_link)
    report = swap_checkpoint(llava, towers["CLIP"], tmp_path / "out", verify="bytes")
    before, after = language_of(llava), language_of(tmp_path / "out")
    assert report["proof"]["linked_files"] == 0 and all(torch.equal(before[name], after[name]) for name in before)


def test_complaint_15_opens_in_plain_transformers_in_a_fresh_process(llava, towers, tmp_path):
    """A model with a custom tower opens nowhere but in the code that made it: a native tower's result has to open where
    this package cannot be imported, with the same logits and the same answer."""
    report = swap_checkpoint(llava, towers["RICE"], tmp_path / "out", verify="full")
    assert report["proof"]["reload"].startswith(
        "by plain transformers in a fresh process: no missing or unexpected keys"
    )
    assert json.loads((tmp_path / "out" / "swap.json").read_text())["kept"].keys() == language_of(llava).keys()


@pytest.mark.parametrize(
    ("kind", "fresh"),
    [("Llava", False), ("LlavaNext", False), pytest.param("Llava", True, marks=pytest.mark.slow)],
)
def test_regions_on_the_way_with_no_row_to_spare(kind, fresh, towers, tmp_path, request):
    if not fresh:
        request.getfixturevalue("forked")
    model, processor = tiny_llava(kind, torch.float32)
    rows = len(processor.tokenizer)
    for part in (model.model.language_model.embed_tokens, model.lm_head):
        part.weight = torch.nn.Parameter(part.weight[:rows].detach())
    model.config.text_config.vocab_size = rows
    source = save_as(model, processor, tmp_path / "in", "v4", 3)
    # auto: so small a model is opened, too; by this package, whose class it is
    report = swap_checkpoint(source, towers["RICE"], tmp_path / "out", regions=True)
    assert "by this package in a fresh process" in report["proof"]["reload"]
    assert report["to_train"] == ["multi_modal_projector", "region_projector"]
    before, after = language_of(source), language_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name][: len(before[name])]) for name in before)
    assert len(after["lm_head.weight"]) == rows + 1 and load_mllm(tmp_path / "out")[1].region_token_id == rows


@pytest.mark.parametrize(
    ("readout", "fields", "stays"),
    [
        (ClocVisionModel, {}, "cloc_vision_model"),  # its prompter has learned
        (UmgClipVisionModel, {"reduce_after": 1}, "umg_clip_vision_model"),  # it merges tokens
        (UmgClipVisionModel, {}, None),  # its readout has no parameters
    ],
)
def test_a_tower_of_ours_stays_ours_when_the_native_one_would_be_another(
    readout, fields, stays, llava, tmp_path, forked
):
    readout.from_native(tiny_tower("CLIP"), **fields).save_pretrained(tmp_path / "tower")
    verify = "full" if readout is ClocVisionModel else "bytes"
    report = swap_checkpoint(llava, tmp_path / "tower", tmp_path / "out", verify=verify)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["vision_config"]["model_type"] == (stays or "clip_vision_model")
    assert report["opens_in_plain_transformers"] == (stays is None)
    assert "by this package" in report["proof"]["reload"] or verify == "bytes"


@pytest.mark.parametrize(("kind", "layout"), [("Llava", "v4"), ("LlavaNext", "v5")])
@pytest.mark.usefixtures("forked")
def test_a_model_with_regions_is_a_source_too(kind, layout, towers, tmp_path):
    given = swap_vision_tower(*tiny_llava(kind, torch.bfloat16), tiny_tower("RICE", seed=7))
    source = save_as(*add_regions(*given), tmp_path / "in", layout, 2)
    report = swap_checkpoint(source, towers["SigLIP"], tmp_path / "out", regions=True, verify="full")
    assert "by this package in a fresh process" in report["proof"]["reload"]
    assert report["to_train"] == ["multi_modal_projector", "region_projector"] and report["before"] != report["after"]
    before, after = language_of(source), language_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert load_mllm(tmp_path / "out")[0].config.vision.model_type == "roi_vision_model"


def test_the_packaged_model_is_a_source(towers, tmp_path, noise_image):
    """It merges tokens, has positions of its own and tied embeddings: all of that stays."""
    report = swap_checkpoint("nano", towers["RICE"], tmp_path / "out", verify="bytes")
    assert report["before"]["language_parameters"] == report["after"]["language_parameters"]
    model, processor = load_mllm(tmp_path / "out", device="cpu")
    assert model.config.text_config.to_dict() == load_mllm("nano", device="cpu")[0].config.text_config.to_dict()
    question = Question(noise_image(), "What is in <region>?", [(5, 5, 60, 60)])
    (answer,) = answer_questions(model, processor, [question], max_new_tokens=3)
    assert isinstance(answer.text, str) and processor.image_size == 56


def test_a_source_in_fp16_stays_so(towers, tmp_path):
    source = save_as(*tiny_llava("LlavaNext", torch.float16), tmp_path / "in", "v4", shards=3)
    report = swap_checkpoint(source, towers["RICE"], tmp_path / "out", verify="bytes")
    before, after = language_of(source), language_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float16}
    assert report["proof"]["linked_files"] > 0 and report["proof"]["bytes"].startswith("all equal: keys")


def test_another_dtype(llava, towers, tmp_path):
    report = swap_checkpoint(llava, towers["SigLIP"], tmp_path / "out", dtype="fp16", verify="bytes")
    before, after = language_of(llava), language_of(tmp_path / "out")
    assert all(torch.equal(before[name].half(), after[name]) for name in before)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float16}
    assert report["proof"]["linked_files"] == 0 and "rounded to fp16" in report["proof"]["bytes"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_tied_embeddings_and_a_kept_projector(towers, tmp_path):
    source = save_as(*tiny_llava("LlavaOnevision", torch.bfloat16, tie=True), tmp_path / "in", "v4", 2)
    tiny_tower("MLCD", 32).save_pretrained(tmp_path / "narrow")
    report = swap_checkpoint(source, tmp_path / "narrow", tmp_path / "out", keep_projector=True, verify="bytes")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    kept = [name for name in before if not name.startswith("model.vision_tower.")]
    assert "lm_head.weight" not in after and all(torch.equal(before[name], after[name]) for name in kept)
    assert report["to_train"] == []


def test_complaint_1_the_report_says_what_changes_and_what_has_to_be_trained(llava, tmp_path):
    """Can I change the tower, what do I have to train then, how many tokens does a picture take, and does it fit?"""
    tiny_tower("CLIP", 64).save_pretrained(tmp_path / "tower")
    report = swap_checkpoint(llava, tmp_path / "tower", tmp_path / "out", image_size=112, verify="bytes")
    before, after = report["before"], report["after"]
    assert (before["image_tokens"], after["image_tokens"], after["context_used"]) == (16, 64, round(64 / 2048, 4))
    assert after["image_size"] == 112 and before["language_parameters"] == after["language_parameters"]
    assert after["tower_gflops"] > 4 * before["tower_gflops"] and after["stage2_gib"] > after["stage1_gib"]
    # two matrices with biases
    assert after["projector_parameters"] == 64 * 40 + 40 + 40 * 40 + 40
    assert report["to_train"] == ["multi_modal_projector"]
    commands = report["commands"]
    assert "align" in commands[0] and f'model={{mllm: "{tmp_path / "out"}"}}' in commands[0]
    assert "instruct" in commands[1] and "lr.tower=0" in commands[1]
    text = swap_table(report)
    assert "image tokens" in text and "multi_modal_projector" in text and commands[1] in text


def test_the_tower_has_the_names_that_transformers_writes(llava, towers, tmp_path):
    swap_checkpoint(llava, towers["DINOv3"], tmp_path / "out", verify="bytes")
    last = max((tmp_path / "out").glob("*.safetensors"))
    assert all(name.startswith(("vision_tower.", "multi_modal_projector.")) for name in read_header(last))
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
