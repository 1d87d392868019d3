"""swap_checkpoint when it is interrupted, when files are damaged and when users err: never half a model."""

import json

import pytest
import torch
from swapped_files import language_of

from regiontower.benchmarks._tiny_llavas import save_as, tiny_llava
from regiontower.mllm import swap_checkpoint, swap_files
from regiontower.mllm.swap_proof import difference
from regiontower.vision_towers import UserError


def test_an_interrupted_swap_is_taken_up_and_shows_nothing_half(llava, towers, tmp_path, monkeypatch):
    copy, calls = swap_files.same_file, []

    def stop_at_second(source, target):
        calls.append(target.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return copy(source, target)

    monkeypatch.setattr(swap_files, "same_file", stop_at_second)
    monkeypatch.setattr(swap_files, "ThreadPoolExecutor", _OneAfterTheOther)
    with pytest.raises(KeyboardInterrupt):
        swap_checkpoint(llava, towers["RICE"], tmp_path / "out", verify="bytes")
    assert not (tmp_path / "out").exists()
    finished = sorted(path.name for path in (tmp_path / ".out.partial").glob("model-*.safetensors"))
    assert len(finished) == 2
    (tmp_path / ".out.partial" / finished[0]).unlink()  # somebody made room
    report = swap_checkpoint(llava, towers["RICE"], tmp_path / "out", verify="bytes")
    assert report["proof"]["resumed_files"] == 1 and len(calls) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").glob(".*"))
    assert language_of(tmp_path / "out").keys() == language_of(llava).keys()


def test_a_finished_file_that_was_damaged_meanwhile_is_written_again(llava, towers, tmp_path, monkeypatch):
    def out_of_power(*about):
        raise KeyboardInterrupt

    monkeypatch.setattr(swap_files, "_save_settings", out_of_power)
    with pytest.raises(KeyboardInterrupt):
        swap_checkpoint(llava, towers["RICE"], tmp_path / "out", verify="bytes")
    monkeypatch.undo()
    stage = tmp_path / ".out.partial"
    done = json.loads((stage / "progress.json").read_text())["done"]
    copied = [number for number, about in enumerate(done.values(), start=1) if not about["linked"]]
    assert copied
    file = next(stage.glob(f"model-{copied[0]:05}-of-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    report = swap_checkpoint(llava, towers["RICE"], tmp_path / "out", verify="bytes")
    assert report["proof"]["resumed_files"] == len(done) - 1
    before, after = language_of(llava), language_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_try_from_other_files_is_not_taken_up(llava, towers, tmp_path):
    stage = tmp_path / ".out.partial"
    stage.mkdir()
    (stage / "model-00001-of-00004.safetensors").write_bytes(b"of another swap")
    (stage / "progress.json").write_text(json.dumps({"signature": "other", "done": {"x": {}}}))
    report = swap_checkpoint(llava, towers["CLIP"], tmp_path / "out", verify="bytes")
    assert report["proof"]["resumed_files"] == 0 and not stage.exists()


def test_bytes_that_arrive_changed_are_found(llava, towers, tmp_path, monkeypatch):
    copy = swap_files.copy_tensors

    def copy_badly(source, tensors, target, dtype):
        proofs = copy(source, tensors, target, dtype)
        with target.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x7f")
        return proofs

    monkeypatch.setattr(swap_files, "copy_tensors", copy_badly)
    with pytest.raises(UserError, match=r"does not hold .* as it was written"):
        swap_checkpoint(llava, towers["CLIP"], tmp_path / "out", verify="bytes")
    assert not (tmp_path / "out").exists()


def test_a_result_that_is_not_the_swap_is_found(llava, towers, tmp_path, monkeypatch):
    keys = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    answers = {"logits": torch.ones(1, 2, 3), "ids": torch.ones(1, 4, dtype=torch.long)}
    assert difference(keys, answers, answers) == ""
    for part, said in (("logits", "logits by 1"), ("ids", "the ids of the answer")):
        assert difference(keys, answers | {part: answers[part] * 2}, answers) == said
    # Where weights lie in memory shows in the last bits on some processors; anything more is another model.
    assert difference(keys, answers | {"logits": answers["logits"] + 5e-6}, answers) == ""
    assert difference(keys, answers | {"logits": answers["logits"] + 5e-5}, answers).startswith("logits by 5e-05")
    assert difference(keys, answers | {"logits": answers["logits"] * torch.nan}, answers) == "logits by inf"
    assert difference(keys, answers | {"logits": torch.ones(1, 2, 4)}, answers) == "logits by inf"
    absent = keys | {"missing_keys": ["model.a", "model.b"]}
    assert difference(absent, answers, answers) == "2 missing keys, e.g. model.a"

    monkeypatch.setattr("regiontower.mllm.swap_on_disk.answers_elsewhere", lambda *_: (absent, answers))
    with pytest.raises(UserError, match="differs from the swap in memory") as error:
        swap_checkpoint(llava, towers["CLIP"], tmp_path / "out", verify="full")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_write_nothing(llava, towers, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "no model").mkdir()
    broken = save_as(*tiny_llava("Llava"), tmp_path / "broken", "v4", 2)
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    strange = save_as(*tiny_llava("Llava"), tmp_path / "strange", "v4", 1)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "patch"}))
    out = tmp_path / "out"
    cases = {
        "is not empty": (llava, towers["CLIP"], tmp_path / "full", {}),
        "--verify must be": (llava, towers["CLIP"], out, {"verify": "perhaps"}),
        "--dtype must be": (llava, towers["CLIP"], out, {"dtype": "int8"}),
        "no config.json": (tmp_path / "no model", towers["CLIP"], out, {}),
        "cannot be swapped": (towers["SigLIP"], towers["CLIP"], out, {}),
        "cannot be opened": (strange, towers["CLIP"], out, {}),
        "ends before its last tensor": (broken, towers["CLIP"], out, {}),
        "the nearest size is": (llava, towers["CLIP"], out, {"image_size": 60}),
        "give a feature layer between": (llava, towers["CLIP"], out, {"feature_layer": 7}),
        "the projector cannot be kept": (llava, towers["CLIP"], out, {"keep_projector": True}),
    }
    for words, (source, tower, folder, options) in cases.items():
        with pytest.raises(UserError, match=words) as error:
            swap_checkpoint(source, tower, folder, **options)
        assert "\n" not in str(error.value) and not out.exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


class _OneAfterTheOther:
    def __init__(self, threads):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *about):
        return None

    map = staticmethod(map)
