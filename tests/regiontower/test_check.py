"""`regiontower check` as a user types it."""

import json
import sys

import pytest

from regiontower.benchmarks._tiny_llavas import tiny_llava, tiny_tower
from regiontower.cli import main
from regiontower.mllm import swap_vision_tower


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)` -> (status, stdout, stderr) of `regiontower check`, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["regiontower", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def folder(tmp_path):
    for part in swap_vision_tower(*tiny_llava("Llava"), tiny_tower("CLIP")):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, file, **values):
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(fields | values))


def test_a_line_a_finding_and_a_status(run, folder):
    assert run(folder)[:2] == (0, "nothing found\n")
    change(folder, "config.json", image_seq_length=577)
    status, said, _ = run(folder)
    assert status == 0 and said.count("\n") == 1 and said.startswith("warning: image_seq_length is 577")
    change(folder, "processor_config.json", patch_size=7)
    change(folder, "config.json", image_token_index=3)
    status, said, _ = run(folder)
    lines = said.splitlines()
    assert status == 1 and len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert all(line.count("; ") == 2 for line in lines)  # what, why, how to mend it
    status, said, _ = run(folder, "--json")
    last = json.loads(said.strip().splitlines()[-1])
    assert status == 1 and last["errors"] == 2 and {"what", "why", "mend"} < set(last["findings"][0])


def test_a_recipe_is_looked_at_with_its_model(run, folder):
    whole = ("--set", f"model={{mllm: {folder}}}")
    assert run("align-real", *whole)[:2] == (0, "nothing found\n")
    status, said, _ = run("align-real", *whole, "--set", "data.mix={grounding: 1}")
    assert status == 1 and said.startswith("error: nothing in the data asks about a region; ")
    change(folder, "config.json", vision_feature_select_strategy="full")
    status, said, _ = run("align-real", *whole)
    assert status == 1 and "the processor writes 16 placeholders for 56 px, the model makes 17" in said


def test_a_mistake_is_one_line(run, tmp_path):
    for arguments in ((tmp_path / "absent",), ("no-such.yaml",), ("rice-nano",)):
        status, _, said = run(*arguments)
        assert status == 1 and said.startswith("regiontower: ") and said.count("\n") == 1, said
