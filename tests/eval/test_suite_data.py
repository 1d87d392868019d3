"""Rows of a suite that are missing or cannot be used are named before anything is asked."""

import shutil

import pytest

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from datasets import Dataset
from suite_rows import HUB

from regiontower.eval.suite_data import find_data
from regiontower.eval.suites import suite_tasks
from regiontower.vision_towers.errors import UserError


def test_without_the_hub_the_user_is_told_what_is_missing(data_root, monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    monkeypatch.delenv("REGIONTOWER_DATA", raising=False)
    with pytest.raises(UserError) as error:
        find_data(suite_tasks("ocr"))
    message = str(error.value)
    assert message.startswith("no data for docvqa, textvqa, infovqa, chartqa, ocrbench on this machine")
    assert "lmms-lab-encoder/DocVQA/InfographicVQA (validation) -> DIR/infovqa" in message
    assert "--data-root DIR" in message and "REGIONTOWER_DATA=DIR" in message and "\n" not in message
    # Only one of them is missing, and the root comes from the environment.
    shutil.copytree(data_root, tmp_path / "root")
    shutil.rmtree(tmp_path / "root/chartqa")
    monkeypatch.setenv("REGIONTOWER_DATA", str(tmp_path / "root"))
    with pytest.raises(UserError, match=r"^no data for chartqa in .*root, and the hub"):
        find_data(suite_tasks("ocr"))
    found = find_data(suite_tasks("ocr", ["docvqa", "infovqa"]))
    assert [data.files[0].parent.name for data in found] == ["DocVQA", "InfographicVQA"]


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda path: path.write_text("no parquet"), "is not a parquet file"),
        (lambda path: path.unlink(), "holds no parquet file"),
    ],
)
def test_unusable_files_are_named(data_root, tmp_path, break_it, says):
    shutil.copytree(data_root / "ai2d", tmp_path / "root/ai2d")
    break_it(tmp_path / "root/ai2d" / HUB["ai2d"][0])
    with pytest.raises(UserError, match=says):
        find_data(suite_tasks("general", ["ai2d"]), tmp_path / "root")


def test_other_columns_and_lone_rows_are_named_before_anything_is_asked(data_root, tmp_path):
    (tmp_path / "root").mkdir()
    shutil.copytree(data_root / "pope", tmp_path / "root/ai2d")
    with pytest.raises(UserError, match="lacks the columns options, which ai2d reads"):
        find_data(suite_tasks("general", ["ai2d"]), tmp_path / "root")
    rows = Dataset.from_parquet(str(data_root / "mme" / HUB["mme"][0]), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "root/mme").mkdir()
    rows.select([0, 2, 1, 3]).to_parquet(str(tmp_path / "root/mme/test.parquet"))
    with pytest.raises(UserError, match=r"mme scores 2 rows of one question_id together.*existence/1\.png"):
        find_data(suite_tasks("general", ["mme"]), tmp_path / "root")
