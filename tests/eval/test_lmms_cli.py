"""A checkpoint on disk, through our own call and through lmms-eval's command."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from regiontower.eval.run import evaluate
from regiontower.eval.task_folder import task_folder

TASKS = ["regiontower_grounding", "regiontower_reading"]


def test_both_ways_give_the_same_answers(tiny_mllm_dir, records_path, isolated_cache, tmp_path):
    ours = evaluate(tiny_mllm_dir, records_path, TASKS, tmp_path / "ours", device="cpu", limit=2, progress=False)
    arguments = f"pretrained={tiny_mllm_dir},resume={tmp_path / 'responses.jsonl'}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "regiontower", "--model_args", arguments]
    command += ["--include_path", str(task_folder(records_path, limit=2)), "--tasks", ",".join(TASKS)]
    command += ["--batch_size", "2", "--device", "cpu", "--output_path", str(tmp_path / "theirs"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run(command, env=os.environ | offline, cwd=tmp_path, capture_output=True, text=True, check=False)
    # Its exit status is 0 whatever happens: the files tell.
    found = list((tmp_path / "theirs").rglob("*_results.json"))
    assert len(found) == 1, ran.stdout[-2000:] + ran.stderr[-4000:]
    figures = json.loads(found[0].read_text())["results"]
    assert figures["regiontower_grounding"]["acc50,none"] == ours.tasks["regiontower_grounding"]["acc50"]
    assert figures["regiontower_reading"]["em,none"] == ours.tasks["regiontower_reading"]["em"]
    for task in TASKS:
        (samples,) = (tmp_path / "theirs").rglob(f"*_samples_{task}.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        assert [row["filtered_resps"] for row in rows] == [row["answer"] for row in ours.samples[task]]
        assert [row["prediction"]["correct"] for row in rows] == [row["correct"] for row in ours.samples[task]]
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 4
