"""Crashes: kill -9 at any moment, a full disk, weights that are no numbers, damaged checkpoints.

All kill points: `python -m pytest -n 0 -m "slow or not slow" tests/train_stages/test_crash.py`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
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
from small_runs import FORK, NO_FORK, At, assert_equal_weights, signal_at, small_run

from regiontower.cli import main
from regiontower.train_stages.engine.checkpoint_files import DIGEST_FILE, damage
from regiontower.train_stages.engine.interrupt import EXIT_STATUS
from regiontower.train_stages.engine.run_dir import checkpoints, remove_run
from regiontower.train_stages.engine.run_log import LOG_FILE, LogRow, read_rows
from regiontower.train_stages.mllm_stage import InstructRecipe, instruct
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers.errors import UserError

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


# ---- on a small model of the engine alone ----


def stop_at(run_dir: Path, step: int) -> None:
    with pytest.raises(SystemExit):
        small_run(run_dir, callbacks=[signal_at(step)])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """Holds a run that nothing disturbed, `straight`, and one that was stopped at step 4, `run`; to be copied."""
    folder = tmp_path_factory.mktemp("small")
    small_run(folder / "straight")
    stop_at(folder / "run", 4)
    return folder


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("model.safetensors", "flipped"),
        ("optimizer.pt", "cut"),
        ("trainer_state.json", "flipped"),
        ("clock.json", "gone"),
        (DIGEST_FILE, "[]"),
        (DIGEST_FILE, "{}"),
        (DIGEST_FILE, '{"model.safetensors": 5}'),
        (DIGEST_FILE, '{"model.safetensors": [5]}'),
    ],
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(stopped, tmp_path, capsys, file, how):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_2", "step_4"]
    path = checkpoints(tmp_path / "run")[-1] / file
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    broken = {"cut": whole[: len(whole) // 2], "flipped": flipped}
    path.unlink() if how == "gone" else path.write_bytes(broken.get(how, how.encode()))
    capsys.readouterr()
    small_run(tmp_path / "run")
    said = capsys.readouterr().err
    assert f"step_4 cannot be used ({file} is {'missing' if how == 'gone' else 'damaged'}" in said
    assert "resuming from step 2" in said
    assert_equal_weights(tmp_path / "straight", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "damaged_step_4").is_dir()  # for whoever wants to look


def test_with_no_checkpoint_left_a_run_begins_again_and_says_so(stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for checkpoint in checkpoints(tmp_path / "run"):
        (checkpoint / DIGEST_FILE).write_text("{")
    capsys.readouterr()
    small_run(tmp_path / "run")
    assert "no checkpoint is left: starting from the beginning" in capsys.readouterr().err
    assert_equal_weights(tmp_path / "straight", tmp_path / "run")


def test_checkpoints_of_older_versions_have_no_checksums_and_are_read_as_far_as_possible(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    checkpoint = checkpoints(tmp_path / "run")[-1]
    (checkpoint / DIGEST_FILE).unlink()
    assert damage(checkpoint) is None
    (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes()[:-40])
    assert damage(checkpoint) == "optimizer.pt is damaged"


def test_a_run_of_an_older_version_goes_on_although_recipes_have_new_keys_now(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "run" / "recipe.yaml"
    lines = recipe.read_text().splitlines()
    older = [line for line in lines if "muon_lr" not in line and "compile" not in line]
    assert len(older) == len(lines) - 2
    recipe.write_text("\n".join(older))
    small_run(tmp_path / "run")
    assert_equal_weights(tmp_path / "straight", tmp_path / "run")


def _with_a_small_disk(run_dir: Path, limit: int, said: Path) -> None:
    """The operating system refuses files above `limit` bytes from step 3 on, as a full disk refuses them."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    fill = At(3, lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
    try:
        small_run(run_dir, width=4096, callbacks=[fill])
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(str(error))
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("limit", [40_000, 120_000], ids=["weights", "optimizer"])  # which file is the first too large
def test_a_full_disk_stops_the_run_and_costs_no_checkpoint(tmp_path, limit):
    small_run(tmp_path / "straight", width=4096)
    process = FORK.Process(target=_with_a_small_disk, args=(tmp_path / "run", limit, tmp_path / "said"))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert "could not be written" in said and "step_2 is whole and kept" in said and "\n" not in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2"]
    assert damage(checkpoints(tmp_path / "run")[0]) is None
    small_run(tmp_path / "run", width=4096)
    assert_equal_weights(tmp_path / "straight", tmp_path / "run")


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(tmp_path):
    def poison(model):
        model.head[0].weight.data[0, 0] = float("nan")

    with pytest.raises(UserError, match=r"The loss is nan at step 4: .* Checkpoints from before are kept"):
        small_run(tmp_path / "run", callbacks=[At(3, poison)])
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_2"]


def test_broken_weights_behind_a_good_loss_are_not_saved(tmp_path):
    """The update of the very step that is saved may have broken what its loss did not see yet."""

    def poison(model):
        model.head[0].weight.data[0, 0] = float("inf")

    with pytest.raises(UserError, match="The weights are no longer finite after step 4"):
        small_run(tmp_path / "run", callbacks=[At(4, poison)])
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_2"]


def test_overwrite_that_was_killed_can_be_given_again(stopped, tmp_path):
    """stage.json is the last to go: without it the old weights would pass for a model of unknown origin."""
    shutil.copytree(stopped / "straight", tmp_path / "run")
    order = []
    real = Path.unlink

    def unlink(path, missing_ok=False):
        order.append(path.name)
        real(path, missing_ok=missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        remove_run(tmp_path / "run")
    assert order[0] == "model.safetensors" and order[-1] == "stage.json"
