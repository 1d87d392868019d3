"""Files of a run: damaged checkpoints, a full disk, weights that are no numbers, an overwrite that was killed."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from small_runs import FORK, NO_FORK, At, assert_equal_weights, signal_at, small_run

from regiontower.train_stages.engine.checkpoint_files import DIGEST_FILE, damage
from regiontower.train_stages.engine.run_dir import checkpoints, remove_run
from regiontower.vision_towers.errors import UserError

pytestmark = pytest.mark.skipif(NO_FORK, reason="needs fork")


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
