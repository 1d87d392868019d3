"""What a run tells: trackers, throughput, an estimate of utilisation."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch
from small_runs import signal_at, small_run
from torch.utils.flop_counter import FlopCounterMode

from regiontower.train_stages.engine import StageInterrupted, Work, trackers
from regiontower.train_stages.engine import throughput as speed
from regiontower.train_stages.engine.run_log import LOG_FILE, LogRow, read_rows
from regiontower.train_stages.engine.throughput import Throughput, peak_flops
from regiontower.train_stages.mllm_work import MllmWork
from regiontower.train_stages.tuning import LayerDecay, tuned_parts
from regiontower.vision_towers.errors import UserError


def run(run_dir, **options):
    return small_run(run_dir, options={"count_work": lambda batch: Work(batch["x"].numel(), 1e6)}, **options)


def test_tensorboard_gets_loss_rates_metrics_and_throughput_once_a_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(StageInterrupted):
        run(tmp_path / "run", callbacks=[signal_at(4)], report_to=("tensorboard",))
    run(tmp_path / "run", report_to=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = read_rows(tmp_path / "run" / LOG_FILE, LogRow)
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row.step, pytest.approx(row.loss, rel=1e-6)) for row in rows] and len(losses) == 6
    assert [event.value for event in events.Scalars("train/lr/head")] == pytest.approx([row.lr["head"] for row in rows])
    assert [event.value for event in events.Scalars("train/error")] == pytest.approx(
        [row.metrics["error"] for row in rows], rel=1e-5
    )
    for name in ("data_wait", "tokens_per_s", "mfu"):
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx(
            [row.throughput[name] for row in rows], rel=1e-5
        )


def test_wandb_writes_its_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    import wandb

    run(tmp_path / "run", report_to=("wandb",))
    try:
        assert wandb.run.project == "regiontower" and wandb.run.name == "run"
        summary = dict(wandb.run.summary)
        last = read_rows(tmp_path / "run" / LOG_FILE, LogRow)[-1]
        assert summary["train/loss"] == pytest.approx(last.loss) and "train/tokens_per_s" in summary
    finally:
        wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.report_to names wandb, which is not installed: pip install wandb"):
        run(tmp_path / "run", report_to=("wandb",))
    with pytest.raises(UserError, match=r"names comet_ml, which is not installed: pip install comet-ml\.$"):
        run(tmp_path / "run", report_to=("comet_ml", "kubeflow"))
    assert not (tmp_path / "run").exists()


def test_the_log_holds_throughput_and_older_logs_are_read_as_well(tmp_path):
    run(tmp_path / "run")
    path = tmp_path / "run" / LOG_FILE
    for row in read_rows(path, LogRow):
        assert 0 <= row.throughput["data_wait"] <= 1 and row.throughput["tokens_per_s"] > 0 < row.throughput["mfu"]
    older = [json.loads(line) for line in path.read_text().splitlines()]
    for row in older:
        del row["throughput"]
    path.write_text("".join(json.dumps(row) + "\n" for row in older))
    assert [row.throughput for row in read_rows(path, LogRow)] == [{}] * 6
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000


def test_waiting_is_what_passes_until_a_batch_is_there(monkeypatch):
    """A clock of our own: each batch takes 3 seconds to come, the steps between take 5."""
    clock = [0.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            return clock[0]

    monkeypatch.setattr(speed, "time", Time)

    def batches():
        for number in count():
            clock[0] += 3
            yield number

    found = Throughput(lambda: clock[0], torch.device("cpu"), torch.float32, lambda batch: Work(100, 4e9))
    found._peak = 2e9
    timed = found.timed(batches())
    for expected in range(2):
        assert next(timed) == expected
        found.add({})
        clock[0] += 5
    assert found.take() == {"data_wait": 6 / 16, "tokens_per_s": 200 / 16, "mfu": 8e9 / 16 / 2e9}
    clock[0] += 4  # nothing but a step
    assert found.take() == {"data_wait": 0.0}
    assert list(found.timed(iter([]))) == []


def test_a_device_can_do_more_than_nothing():
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e6


@pytest.mark.parametrize(("tower", "language_model"), [(0.0, 0.0), (0.0, 1e-4), (1e-5, 1e-4)])
def test_the_count_of_operations_is_that_of_torch(make_tiny_mllm, tower, language_model):
    """torch's own counter on a real forward and backward; what we leave out (regions, attention of the tower) and what
    it counts besides makes less than a fifth."""
    model, processor = make_tiny_mllm()
    rates = {"tower": tower, "projector": 1e-3, "region_projector": 0.0, "language_model": language_model}
    parts = tuned_parts(model, rates, LayerDecay())
    for part in parts:
        for name, parameter in model.named_parameters():
            if part.covers(name):
                parameter.requires_grad_(part.lr > 0)
    ids = torch.tensor([[processor.tokenizer.convert_tokens_to_ids("<image>")] * 64 + list(range(30, 94))] * 4)
    batch = {"input_ids": ids, "labels": ids, "pixel_values": torch.rand(4, 3, 64, 64)}
    work = MllmWork(model, parts, processor.tokenizer.pad_token_id)(batch)
    assert float(work.tokens) == 4 * 128
    with FlopCounterMode(display=False) as counter:
        model.train()(**batch).loss.backward()
    assert float(work.flops) == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_padding_is_no_work(make_tiny_mllm):
    model, processor = make_tiny_mllm()
    pad = processor.tokenizer.pad_token_id
    rates = dict.fromkeys(("tower", "projector", "region_projector", "language_model"), 1e-3)
    work = MllmWork(model, tuned_parts(model, rates, LayerDecay()), pad)
    short = torch.arange(30, 50)[None]
    padded = torch.cat([short, torch.full((1, 40), pad)], dim=1)
    assert float(work({"input_ids": padded}).flops) == float(work({"input_ids": short}).flops)
    # With SmolLM2 padding is also the token that ends each turn.
    within = torch.tensor([[30, 31, pad, 32, pad, pad]])
    assert float(work({"input_ids": within}).tokens) == 4
