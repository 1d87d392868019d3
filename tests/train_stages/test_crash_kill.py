"""kill -9 at any moment, and SIGTERM: the same command again reaches the same weights.

All kill points: `python -m pytest -n 0 -m "slow or not slow" tests/train_stages/test_crash_kill.py`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import FORK, NO_FORK

from regiontower.cli import main
from regiontower.train_stages.engine.interrupt import EXIT_STATUS
from regiontower.train_stages.engine.run_dir import checkpoints
from regiontower.train_stages.engine.run_log import LOG_FILE, LogRow, read_rows
from regiontower.train_stages.mllm_stage import InstructRecipe, instruct
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.scenes import write_scenes

pytestmark = pytest.mark.skipif(NO_FORK, reason="needs fork")

KILL_POINTS = 20
FAST = (9, 18)  # of them: a later checkpoint (with LoRA), the model at the end
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 6, 0, preset="easy", progress=False)


@pytest.fixture(scope="module")
def sources(scenes) -> list[dict]:
    """Of a mixture: the scenes, and as many conversations without a picture."""
    talks = [
        [{"from": "human", "value": f"Say {n}."}, {"from": "gpt", "value": str(n) * (1 + n % 3)}] for n in range(6)
    ]
    path = scenes.parent / "talks.jsonl"
    path.write_text("\n".join(json.dumps({"conversations": talk}) for talk in talks))
    return [{"records": str(scenes), "turns": 2}, {"records": str(path), "format": "conversations"}]


@dataclass(frozen=True)
class Straight:
    """A run that nothing disturbed. changes: of files in its directory; seconds: it took."""

    recipe: InstructRecipe
    run_dir: Path
    changes: int
    seconds: float


@pytest.fixture(scope="module")
def straight(tiny_mllm_dir, scenes, sources, tmp_path_factory):
    """`straight("full")`, `straight("lora")` (with dropout) or `straight("mixture")` (whose data come from processes of
    their own): a frozen tower, three checkpoints, of which the first is removed on the way."""

    @cache
    def make(kind: str) -> Straight:
        mixed = int(kind == "mixture")
        recipe = load_recipe(
            {
                "model": {"mllm": str(tiny_mllm_dir)},
                "data": {"sources": sources, "window": 8} if mixed else {"records": str(scenes), "turns": 2},
                "lr": {"projector": 1e-3, "region_projector": 1e-3, "language_model": 1e-3},
                "lora": {"rank": 2, "dropout": 0.2} if kind == "lora" else None,
                "train": {"steps": 6, "batch_size": 2, "threads": 1, "log_steps": 1, "save_steps": 2, "workers": mixed},
            },
            InstructRecipe,
        )
        folder = tmp_path_factory.mktemp(kind)
        began = time.monotonic()
        assert command(recipe, folder / "run", folder / "changes") == 0
        return Straight(recipe, folder / "run", int((folder / "changes").read_text()), time.monotonic() - began)

    return make


def command(recipe: InstructRecipe, run_dir: Path, report: Path, kill_at: int | None = None, seconds: float = 0) -> int:
    """Exit code of a process that runs the stage; it kills itself in the middle of its `kill_at`-th change of a file
    in `run_dir`, or is killed after so many seconds. A run that ends writes to `report` how many changes it made."""
    process = FORK.Process(target=_in_child, args=(recipe, run_dir, report, kill_at))
    process.start()
    process.join(timeout=seconds or 200)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _in_child(recipe: InstructRecipe, run_dir: Path, report: Path, kill_at: int | None) -> None:
    changes, training = 0, os.getpid()

    def watch(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event not in EVENTS or not arguments or isinstance(arguments[0], int) or os.getpid() != training:
            return
        path = os.fsdecode(arguments[0])
        if not path.startswith(str(run_dir)) and os.path.isabs(path):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        changes += 1
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        instruct(recipe, run_dir, device="cpu")
        report.write_text(str(changes))
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def assert_same(run_dir: Path, straight: Straight) -> None:
    name = "model.safetensors" if straight.recipe.lora is None else "adapter_model.safetensors"
    expected, found = (load_file(folder / name) for folder in (straight.run_dir, run_dir))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    logs = [read_rows(folder / LOG_FILE, LogRow) for folder in (straight.run_dir, run_dir)]
    rows = [[(row.step, row.loss) for row in log] for log in logs]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert json.loads((run_dir / "stage.json").read_text())["status"] == "finished"
    assert not [path for path in run_dir.rglob("*") if path.name.startswith((".model", "checkpoint-"))]


@pytest.mark.parametrize(
    "point", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in range(KILL_POINTS)]
)
def test_kill_9_then_the_same_command_reaches_the_same_weights(straight, tmp_path, point):
    """Every second point with LoRA."""
    whole = straight("lora" if point % 2 else "full")
    assert whole.changes > 2 * KILL_POINTS
    kill_at = 1 + point * (whole.changes - 1) // (KILL_POINTS - 1)
    assert command(whole.recipe, tmp_path / "run", tmp_path / "changes", kill_at) == -signal.SIGKILL
    assert command(whole.recipe, tmp_path / "run", tmp_path / "changes") == 0
    assert_same(tmp_path / "run", whole)


def test_kill_9_of_a_mixture_that_other_processes_load_reaches_the_same_weights(straight, tmp_path):
    whole = straight("mixture")
    assert command(whole.recipe, tmp_path / "run", tmp_path / "changes", whole.changes // 2) == -signal.SIGKILL
    assert checkpoints(tmp_path / "run") and not (tmp_path / "run" / "model.safetensors").exists()
    assert command(whole.recipe, tmp_path / "run", tmp_path / "changes") == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_kill_9_again_and_again_still_ends_in_the_same_weights(straight, tmp_path, kind):
    whole, kills = straight(kind), 0
    # Each try gets a little further than a checkpoint, so that all of them together arrive.
    while command(whole.recipe, tmp_path / "run", tmp_path / "changes", whole.changes // 2 + 3 * kills) != 0:
        kills += 1
        assert kills < 30
    assert kills >= 2
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 0.9])
def test_kill_9_by_the_clock(straight, tmp_path, share):
    whole = straight("full")
    command(whole.recipe, tmp_path / "run", tmp_path / "changes", seconds=share * whole.seconds)
    assert command(whole.recipe, tmp_path / "run", tmp_path / "changes") == 0
    assert_same(tmp_path / "run", whole)


def _by_command(recipe: Path, run_dir: Path) -> None:
    sys.argv = ["regiontower", "instruct", str(recipe), "--out", str(run_dir), "--device", "cpu"]
    main()


def test_sigterm_saves_and_its_exit_status_says_so(straight, tmp_path):
    """Of the command itself."""
    whole = straight("full")
    process = FORK.Process(target=_by_command, args=(whole.run_dir / "recipe.yaml", tmp_path / "run"))
    process.start()
    log = tmp_path / "run" / LOG_FILE
    for _ in range(2000):
        if log.is_file():
            break
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=100)
    stage = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert process.exitcode == EXIT_STATUS == 75
    assert stage["status"] == "interrupted"
    assert checkpoints(tmp_path / "run")[-1].name == f"step_{stage['steps']}"
    assert command(whole.recipe, tmp_path / "run", tmp_path / "changes") == 0
    assert_same(tmp_path / "run", whole)
