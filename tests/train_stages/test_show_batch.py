"""`check RECIPE --show-batch`: what is learned, and the mistakes that show nowhere else."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from regiontower.cli import app
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.show_batch import look_at_samples
from regiontower.vision_towers import UserError


@pytest.fixture(scope="module")
def root(make_tiny_mllm, tmp_path_factory):
    """Scenes, a tower and a language model without weights (they are not read)."""
    folder = tmp_path_factory.mktemp("shown")
    write_scenes(folder, 12, 0, preset="easy", progress=False)
    model, processor = make_tiny_mllm()
    model.model.vision_tower.save_pretrained(folder / "tower")
    model.config.text_config.save_pretrained(folder / "lm")
    processor.tokenizer.save_pretrained(folder / "lm")
    for part in (model, processor):
        part.save_pretrained(folder / "mllm")
    return folder


def write_recipe(root, name, model=None, data=None):
    recipe = {
        "model": model or {"tower": str(root / "tower"), "language_model": str(root / "lm")},
        "data": data or {"records": str(root / "records.jsonl"), "turns": 3},
        "train": {"steps": 1, "batch_size": 4},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(path, *more):
    return CliRunner().invoke(app, ["check", str(path), "--show-batch", "--json", *more])


def test_what_is_learned_is_shown(root):
    found = run(write_recipe(root, "align"))
    assert found.exit_code == 0, found.output
    shown = json.loads(found.stdout.splitlines()[-1])
    batch = shown["batch"]
    assert shown["errors"] == 0 and batch["looked"] == 200 and batch["masked"] == batch["bad"] == 0
    assert len(batch["samples"]) == 3
    for sample in batch["samples"]:
        asked, answered = sample[0], sample[1]
        assert not asked["learned"] and asked["text"].startswith("<|user|><image>x64") and answered["learned"]
        assert asked["text"].endswith("<|assistant|>") and answered["text"].endswith("<|end|>")
    assert 0 < batch["learned"] < batch["tokens"] / 2
    assert 64 < batch["lengths"]["median"] <= batch["lengths"]["p95"] <= batch["lengths"]["longest"]
    assert 1 <= batch["padding"]["grouped"] < batch["padding"]["plain"] < 3 and batch["per_row"] > 5
    assert "⟦" in found.stderr and "tokens are learned" in found.stderr


def test_a_finished_model_and_a_mixture(root):
    data = {"sources": [{"records": str(root / "records.jsonl"), "turns": 2}], "batches": "packed", "row_tokens": 500}
    report, findings = look_at_samples(write_recipe(root, "instruct", {"mllm": str(root / "mllm")}, data), count=20)
    assert findings == [] and report.looked == 20 and report.per_row >= 2


def test_more_than_one_percent_of_masked_samples_fails(root):
    found = run(write_recipe(root, "short"), "--set", "data.max_tokens=100")
    assert found.exit_code == 1
    shown = json.loads(found.stdout.splitlines()[-1])
    assert shown["batch"]["masked"] > 2
    (finding,) = shown["findings"]
    assert finding["level"] == "error" and "no token is learned" in finding["what"]
    assert "raise data.max_tokens" in finding["mend"]


def test_nothing_that_can_be_learned_is_one_sentence(root):
    with pytest.raises(UserError, match="none of 10 samples can be learned from") as error:
        look_at_samples(write_recipe(root, "nothing"), ["data.max_tokens=70"], count=10)
    assert "\n" not in str(error.value)


def test_a_template_without_an_end_is_warned_of(root):
    template = root / "endless.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    _, findings = look_at_samples(write_recipe(root, "endless"), [f"model.chat_template={template}"], count=10)
    assert [finding.level for finding in findings] == ["warning"] and "never learns to stop" in findings[0].why


def test_a_model_has_no_samples(root):
    found = CliRunner().invoke(app, ["check", str(root / "mllm"), "--show-batch"])
    assert isinstance(found.exception, UserError) and "is none" in str(found.exception)
