"""A LoRA run directory: opened, asked, merged, exported, and refused when its base is another model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from regiontower.cli import app
from regiontower.mllm import ChatSession, Question, RegionLlavaForConditionalGeneration, answer_questions, load_mllm
from regiontower.mllm.adapters import has_adapter, write_adapter
from regiontower.train_stages.lora import LoraRecipe, add_lora
from regiontower.vision_towers import UserError

PROJECTORS = ("model.multi_modal_projector", "model.region_projector")


def write_run(model, processor, folder, base):
    """A LoRA run as `instruct` leaves it, with an adapter and projectors that change the answers."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or any(name.startswith(prefix) for prefix in PROJECTORS):
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder.mkdir()
    write_adapter(model, folder, str(base), PROJECTORS)
    processor.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def tiny_mllm(make_tiny_mllm):
    """One kind of language model is enough here."""
    return make_tiny_mllm()


@pytest.fixture(scope="module")
def tiny_mllm_dir(tiny_mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_mllm")
    for part in tiny_mllm:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["lora", "dora"])
def run(request, make_tiny_mllm, tiny_mllm_dir, tmp_path_factory):
    """(folder, the model as it was trained, its processor)"""
    model, processor = make_tiny_mllm()
    add_lora(model, LoraRecipe(rank=4, dora=request.param == "dora"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, write_run(model, processor, folder, tiny_mllm_dir), processor


@pytest.fixture(scope="module")
def questions(noise_image):
    boxes = [(5, 5, 60, 60)]
    pictures = [noise_image(seed=seed) for seed in range(3)]
    return [Question(picture, "What is in <region>?", boxes) for picture in pictures]


def ids(model, processor, questions) -> list[list[int]]:
    """Greedy ids of each answer."""
    found = []
    for question in questions:
        inputs = processor([question.image], ["<image>What is in <region>?"], boxes=[question.boxes])
        found.append(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist())
    return found


def test_complaint_6_a_lora_run_opens_with_adapter_and_projector(run, questions):
    """LLaVA #808, #784, #1519: the projector was in a file of its own, the base was guessed from the folder's name."""
    folder, trained, processor = run
    model, its_processor = load_mllm(folder, device="cpu")
    assert isinstance(model, RegionLlavaForConditionalGeneration) and has_adapter(model) and not model.training
    assert ids(model, its_processor, questions) == ids(trained, processor, questions)
    chat = ChatSession(model, its_processor, questions[0].image, max_new_tokens=8)
    answer = answer_questions(trained, processor, questions[:1], max_new_tokens=8)[0]
    assert chat.ask("What is in <region>?", [(5, 5, 60, 60)]).text == answer.text


@torch.no_grad()
def test_the_adapter_changes_the_answers_and_peft_reads_its_files(run, tiny_mllm, tiny_mllm_dir, questions):
    folder, trained, processor = run
    assert ids(trained, processor, questions) != ids(*tiny_mllm, questions)
    base = RegionLlavaForConditionalGeneration.from_pretrained(tiny_mllm_dir)
    by_peft = PeftModel.from_pretrained(base, str(folder)).eval()
    inputs = processor([questions[0].image], ["<image>What is in <region>?"], boxes=[questions[0].boxes])
    torch.testing.assert_close(by_peft(**inputs).logits, trained(**inputs).logits)


def test_export_merge_writes_a_checkpoint_with_the_same_greedy_ids(run, questions, tmp_path):
    folder, _, processor = run
    found = CliRunner().invoke(app, ["export", str(folder), "--merge", "--out", str(tmp_path / "merged"), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout.splitlines()[-1])["form"] == "merged"
    _, info = RegionLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    merged, its_processor = load_mllm(tmp_path / "merged", device="cpu", dtype="fp32")
    assert not has_adapter(merged)
    unmerged, _ = load_mllm(folder, device="cpu", dtype="fp32")
    assert ids(merged, its_processor, questions) == ids(unmerged, processor, questions)
    assert (tmp_path / "merged" / "README.md").is_file()


def test_export_merge_takes_the_dtype_of_the_base(run, tmp_path):
    found = CliRunner().invoke(
        app, ["export", str(run[0]), "--merge", "--dtype", "bf16", "--out", str(tmp_path / "merged")]
    )
    assert found.exit_code == 0, found.output
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_an_adapter_of_an_adapter(run, tiny_mllm_dir, questions, tmp_path):
    """Stage 3 on a LoRA stage 2: the lower adapter is merged into the base before the upper one is put on."""
    folder, _, processor = run
    model, _ = load_mllm(folder, device="cpu", merge=True)
    add_lora(model, LoraRecipe(rank=2))
    trained = write_run(model, processor, tmp_path / "second", folder)
    again, _ = load_mllm(tmp_path / "second", device="cpu")
    assert ids(again, processor, questions) == ids(trained, processor, questions)
    with pytest.raises(UserError, match="adapter of an adapter"):
        load_mllm(tmp_path / "second", device="cpu", quant="nf4")


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantized_language_model_alone_or_below_an_adapter(run, tiny_mllm_dir, questions, quant):
    pytest.importorskip("bitsandbytes")
    if quant == "int8" and '"use_dora": true' in (run[0] / "adapter_config.json").read_text():
        with pytest.raises(UserError, match="DoRA, which does not work on int8 weights"):
            load_mllm(run[0], device="cpu", quant=quant)
        return
    for source in (tiny_mllm_dir, run[0]):
        model, processor = load_mllm(source, device="cpu", quant=quant)
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        base = ".base_layer" if source == run[0] else ""
        expected = "Linear4bit" if quant == "nf4" else "Linear8bitLt"
        assert kinds[f"model.language_model.layers.0.mlp.up_proj{base}"] == expected
        assert kinds["model.vision_tower.encoder.layers.0.mlp.fc1"] == "Linear"
        assert kinds["model.multi_modal_projector.linear_1"] == "Linear"
        exact, _ = load_mllm(source, device="cpu")
        inputs = processor([questions[0].image], ["<image>What is in <region>?"], boxes=[questions[0].boxes])
        with torch.no_grad():
            error = (model(**inputs).logits - exact(**inputs).logits).norm() / exact(**inputs).logits.norm()
        assert 0 < error < (0.5 if quant == "nf4" else 0.1), error
        assert len(ids(model, processor, questions[:1])[0]) > 0
    with pytest.raises(UserError, match="cannot be merged into quantized weights"):
        load_mllm(run[0], device="cpu", quant=quant, merge=True)


def test_4_bit_layers_that_a_cpu_cannot_read_are_refused(make_tiny_mllm, tmp_path):
    """bitsandbytes reads wrong scales when a row is not made of whole blocks of 64: an error of 0.4, not 0.09."""
    pytest.importorskip("bitsandbytes")
    for part in make_tiny_mllm(width=48):
        part.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"multiple of 64 inputs on a CPU, and model\.language_model\S+ has 48"):
        load_mllm(tmp_path, device="cpu", quant="nf4")
    load_mllm(tmp_path, device="cpu", quant="int8")


def test_what_is_wrong_with_an_adapter_is_one_sentence(run, tiny_mllm_dir, make_tiny_mllm, tmp_path):
    folder, _, _ = run
    with pytest.raises(UserError, match="is a LoRA run: --merge writes it together with its base"):
        CliRunner().invoke(app, ["export", str(folder), "--out", str(tmp_path / "x")], catch_exceptions=False)
    with pytest.raises(UserError, match="holds no adapter: there is nothing to merge"):
        CliRunner().invoke(
            app, ["export", str(tiny_mllm_dir), "--merge", "--out", str(tmp_path / "x")], catch_exceptions=False
        )
    with pytest.raises(UserError, match="quant must be none, int8, nf4"):
        load_mllm(tiny_mllm_dir, device="cpu", quant="int4")

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    other = tmp_path / "other"
    make_tiny_mllm(seed=3)[0].save_pretrained(other)
    config = json.loads((copy / "adapter_config.json").read_text())
    for base, sentence in ((tmp_path / "gone", "nothing is there"), (other, r"another model .*weights differ")):
        (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
        with pytest.raises(UserError, match=sentence) as error:
            load_mllm(copy, device="cpu")
        assert "\n" not in str(error.value) and "base_model_name_or_path" in str(error.value)
