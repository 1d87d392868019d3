"""Signals as schedulers and launchers send them: several times, and to every process of a job."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from small_runs import FORK, NO_FORK, At, small_run

from regiontower.train_stages.engine import interrupt
from regiontower.train_stages.engine.interrupt import EXIT_STATUS
from regiontower.train_stages.engine.run_dir import checkpoints

pytestmark = pytest.mark.skipif(NO_FORK, reason="needs fork")


def train(run_dir: Path, act, workers: int = 0, same_request: float = interrupt.SAME_REQUEST) -> None:
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ray, in a test before, may have put its own there
    interrupt.SAME_REQUEST = same_request
    in_step_3 = At(3, lambda model: act(), before=True)
    small_run(run_dir, callbacks=[in_step_3], workers=workers, save_steps=500)


def twice() -> None:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.05)
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("same_request", "status"), [(2.0, EXIT_STATUS), (0.0, -signal.SIGTERM)])
def test_a_signal_that_comes_twice_at_once_is_one_request_and_a_later_one_ends_the_run(tmp_path, same_request, status):
    """torchrun hands on what the scheduler has sent to its processes, too."""
    process = FORK.Process(target=train, args=(tmp_path / "run", twice, 0, same_request))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == status
    assert [path.name for path in checkpoints(tmp_path / "run")] == (["step_3"] if status == EXIT_STATUS else [])


def test_a_signal_to_the_whole_job_does_not_cost_the_processes_that_load_data(tmp_path):
    """Whose death would end the training process before it has saved."""
    there = tmp_path / "there"

    def wait() -> None:
        there.touch()
        time.sleep(2)

    process = FORK.Process(target=train, args=(tmp_path / "run", wait, 1))
    process.start()
    for _ in range(1000):
        if there.exists():
            break
        time.sleep(0.05)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    process.join(timeout=100)
    assert process.exitcode == EXIT_STATUS
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_3"]
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)
