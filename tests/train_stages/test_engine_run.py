"""Whole runs on a toy model: run directory, budget, failures, held-out figures."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from small_runs import signal_at
from torch import nn
from toy_stage import TRAIN, NoisyRows, ToyModel, ToyRecipe, assert_same_run, run, stack, stage_of, weights
from transformers import TrainerCallback

from regiontower.train_stages.engine import (
    AuditError,
    HeldOut,
    Part,
    StageInterrupted,
)
from regiontower.train_stages.engine.run_dir import checkpoints
from regiontower.train_stages.engine.run_log import EVAL_FILE, LOG_FILE, EvalRow, LogRow, read_rows
from regiontower.train_stages.recipe import TrainConfig, load_recipe
from regiontower.vision_towers.errors import UserError
from regiontower.vision_towers.weights_hash import weights_hash


def result_loss_at_start() -> float:
    """The loss of step 1 by hand: frozen part in eval mode, dropout drawn from the seed that training starts with."""
    from regiontower.train_stages.engine.seeded_data import EpochSampler, SeededCollate, SeededDataset

    model = ToyModel().train()
    model.tower.eval()
    dataset = SeededDataset(NoisyRows(), TRAIN.seed)
    batch = SeededCollate(stack)(dataset.__getitems__(list(EpochSampler(12, TRAIN.seed))[:2]))
    torch.manual_seed(TRAIN.seed)
    torch.empty((), dtype=torch.int64).random_()  # the data loader draws a seed for its workers first
    return model(**batch)["loss"].item()


def test_a_run_directory_holds_all_it_should(tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    save_model(ToyModel(), str(parent / "model.safetensors"))
    (parent / "stage.json").write_text(json.dumps({"stage": "pretrain", "steps": 3, "data": {"x": "y"}, "audit": {}}))
    before = {name: value.clone() for name, value in ToyModel().state_dict().items()}
    result = run(tmp_path / "run", parents={"tower": parent, "llm": "some/hub-id"})

    assert result.steps == 8 and result.seconds > 0 and result.final_loss is not None
    assert result.metrics["rows"] == 2.0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"recipe.yaml", "stage.json", "log.jsonl", "loss.png", "model.safetensors", "checkpoints"}
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_6", "step_8"]
    assert load_recipe(tmp_path / "run" / "recipe.yaml", ToyRecipe).train == TRAIN

    stage = stage_of(tmp_path / "run")
    assert stage["status"] == "finished" and stage["samples"] == 16
    assert stage["parents"]["tower"]["weights_sha256"] == weights_hash(parent)
    assert stage["parents"]["tower"]["stage"] == {"stage": "pretrain", "steps": 3, "data": {"x": "y"}}
    assert stage["parents"]["llm"] == {"path": "some/hub-id", "weights_sha256": None, "stage": None}
    assert stage["audit"]["moved"] == {"head": 5} and stage["audit"]["frozen_unchanged"] == 7
    assert [row["trainable"] for row in stage["parts"]] == [0, 8 * 8 + 8 + 9 + 1]

    rows = read_rows(tmp_path / "run" / LOG_FILE, LogRow)
    assert [row.step for row in rows] == list(range(1, 9)) and rows[-1].samples == 16
    assert rows[0].lr["head"] > 0 and "tower" not in rows[0].lr
    assert rows[0].loss == pytest.approx(result_loss_at_start(), rel=1e-6)

    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("tower"))
    assert not torch.equal(before["head.1.weight"], after["head.1.weight"])


def test_a_finished_run_returns_at_once_unless_overwritten(tmp_path, capsys):
    first = run(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert run(tmp_path / "run", dataset=None) == first  # nothing of it is touched
    assert "is finished; nothing to do" in capsys.readouterr().err
    again = run(tmp_path / "run", overwrite=True, model=ToyModel(seed=3))
    assert again.steps == 8 and again.final_loss != first.final_loss
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_another_recipe_or_other_data_is_refused_with_the_difference(tmp_path):
    with pytest.raises(StageInterrupted):
        run(tmp_path / "run", callbacks=[signal_at(2, signal.SIGINT)])
    longer = TrainConfig(**(TRAIN.__dict__ | {"steps": 16}))
    with pytest.raises(UserError, match=r"recipe\.train\.steps: 8 there, 16 now"):
        run(tmp_path / "run", longer)
    with pytest.raises(UserError, match=r"data\.rows: abc there, xyz now"):
        run(tmp_path / "run", data={"rows": "xyz"})
    with pytest.raises(UserError, match="stage: align there, instruct now"):
        run(tmp_path / "run", stage="instruct")
    assert run(tmp_path / "run", longer, overwrite=True).steps == 16


def test_a_model_directory_is_not_a_run_directory(tmp_path):
    save_model(ToyModel(), str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="holds a model but no run"):
        run(tmp_path, overwrite=True)


def test_a_budget_of_minutes_ends_the_run_and_counts_what_was_spent(tmp_path):
    train = TrainConfig(minutes=1.5 / 60, batch_size=2, schedule="linear", warmup=0.0, log_steps=1)
    with pytest.raises(StageInterrupted):
        run(tmp_path / "run", train, callbacks=[signal_at(3)])
    spent = stage_of(tmp_path / "run")["seconds"]
    assert 0 < spent < 1.5
    result = run(tmp_path / "run", train, model=ToyModel(seed=7))
    rows = read_rows(tmp_path / "run" / LOG_FILE, LogRow)
    assert result.steps > 3 and [row.step for row in rows] == list(range(1, result.steps + 1))
    assert rows[3].seconds > spent
    assert 1.5 <= result.seconds < 1.5 + 1.0  # overshoots by one step at most
    rates = [row.lr["head"] for row in rows]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.5 * rates[0]
    for row, before in zip(rows[1:], rows, strict=False):
        assert row.lr["head"] == pytest.approx(1e-2 * (1 - before.seconds / 1.5), rel=1e-6)


def test_a_part_that_does_not_move_stops_the_run(tmp_path):
    model = ToyModel()
    model.extra = nn.Linear(2, 2)
    parts = [Part("tower", ("tower",), 0.0), Part("head", ("head", "shift"), 0.01), Part("extra", ("extra",), 0.01)]
    with pytest.raises(AuditError, match="Part extra got no gradient at step 1"):
        run(tmp_path / "run", model=model, parts=parts)
    assert not checkpoints(tmp_path / "run")


def test_a_frozen_tensor_that_moves_stops_the_run(tmp_path):
    class Meddle(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.tower[0].bias.data.add_(1e-4)

    with pytest.raises(AuditError, match=r"tower\.0\.bias is frozen but changed"):
        run(tmp_path / "run", callbacks=[Meddle()])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    def broken(items: list) -> dict:
        return {name: value * float("nan") for name, value in stack(items).items()}

    with pytest.raises(UserError, match="The loss is nan at step 1: lower the learning rate"):
        run(tmp_path / "run", collate=broken)


def test_standard_output_stays_empty(tmp_path, capsys):
    run(tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "What trains" in captured.err and "align: done at step 8" in captured.err
    assert "pin_memory" not in captured.err


def test_devices_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="Unknown device 'tpu'"):
        run(tmp_path / "run", device="tpu")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=3"):
        run(tmp_path / "run", device="cuda:3")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no cuda device"):
            run(tmp_path / "run", device="cuda")


def test_bf16_and_workers_and_plain_sgd(tmp_path):
    train = TrainConfig(epochs=1, batch_size=4, precision="bf16", optimizer="sgd", workers=1, log_steps=1)
    model = ToyModel()
    result = run(tmp_path / "run", train, model=model)
    assert result.steps == 3
    assert model.head(torch.ones(1, 8)).dtype == torch.float32 and "forward" not in vars(model.head)
    assert model.forward.__func__ is ToyModel.forward  # nothing of accelerate is left around it
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights(tmp_path / "run").values())


def test_held_out_figures_change_nothing_and_are_kept(tmp_path):
    seen = []

    def measure():
        seen.append(torch.rand(()).item() + np.random.rand())
        return {"share": 0.25 * len(seen), "loss": 3.0}

    plain = run(tmp_path / "plain")
    measured = run(tmp_path / "run", held_out=HeldOut(measure, every=3))
    assert [row.step for row in read_rows(tmp_path / "run" / EVAL_FILE, EvalRow)] == [3, 6, 8]
    assert measured.metrics["held_out_share"] == 0.75 and "held_out_share" not in plain.metrics
    assert_same_run(tmp_path / "plain", tmp_path / "run")
    assert len(seen) == 3


def test_a_batch_may_be_changed_by_the_time_of_the_run(tmp_path):
    shares, seen = [], []

    class Watching(ToyModel):
        def forward(self, x, y):
            seen.append(x)
            return super().forward(x, y)

    def changed(batch, share):
        shares.append(share)
        return {**batch, "x": torch.full_like(batch["x"], share)}

    run(tmp_path / "run", model=Watching(), on_batch=changed)
    assert shares == pytest.approx([(step + 1) / 9 for step in range(8)])
    assert all((x == share).all() for x, share in zip(seen, shares, strict=True))


def test_use_cache_of_the_config_survives_training(tmp_path):
    class Config:
        use_cache = True

    model = ToyModel()
    model.config = Config()
    run(tmp_path / "run", model=model)
    assert model.config.use_cache is True


def test_weights_hash_sees_names_and_bytes(tmp_path):
    save_model(ToyModel(), str(tmp_path / "a.safetensors"))
    first = weights_hash(tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert weights_hash(tmp_path) != first
    with pytest.raises(UserError, match="no model directory"):
        weights_hash(tmp_path / "checkpoints")
