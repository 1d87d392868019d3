"""The benchmarks of the swap, small."""

import json

import torch

from regiontower.benchmarks import swap, swap_table
from regiontower.mllm import swap_checkpoint


def test_the_table_on_a_native_tower_and_one_that_is_not(monkeypatch):
    monkeypatch.setattr(swap_table, "DTYPES", (torch.bfloat16,))
    rows = swap_table.swap_rows(["LlavaNext"], ["RICE", "DINOv3"])
    assert [row["opens_plain"] for row in rows] == [True, False]
    assert all(row["difference"] == 0 and row["ids_equal"] and row["language_equal"] for row in rows)
    assert "4 register tokens" in rows[1]["plain"]
    table = swap_table.as_markdown(rows).splitlines()
    assert len(table) == 4 and table[0].count("|") == len(swap_table.HEAD) + 1


def test_time_and_memory_are_the_last_line_and_nothing_stays(tmp_path, capsys, monkeypatch):
    reports = []

    def in_this_process(source, tower, work):  # a fresh one imports for longer than all the rest takes
        compile(swap.WORKER, "worker", "exec")
        reports.append(swap_checkpoint(source, tower, work / f"out{len(reports)}", verify="bytes"))
        return {"swap_seconds": 2.0, "peak_rss": 2**30}

    monkeypatch.setattr(swap, "_swap", in_this_process)
    monkeypatch.setattr(swap, "SHARD", 2**23)
    monkeypatch.setattr("sys.argv", ["swap", "--out", str(tmp_path), "--gib", "0.01", "--rounds", "2", "--json"])
    swap.main()
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(last) == {"time_over_cp", "peak_rss_gib", "checkpoint_gib"} and last["peak_rss_gib"] == 1
    assert len(reports) == 2 and reports[0]["proof"]["linked_files"] > 0
    assert not list(tmp_path.iterdir())
