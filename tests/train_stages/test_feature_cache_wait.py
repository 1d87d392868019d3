"""Processes that wait until the first one has filled the feature cache."""

import pytest

from regiontower.train_stages.feature_cache import wait_until_filled
from regiontower.vision_towers import UserError


class Clock:
    """Time that passes in sleep alone; `at` second -> what happens then."""

    def __init__(self, at):
        self.seconds, self.at = 0.0, at

    def now(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds
        if self.seconds in self.at:
            self.at[self.seconds]()


def waiting(monkeypatch, folder, at, rank="0"):
    """What is said while a process waits, and the seconds that it waits."""
    clock, said = Clock(at), []
    monkeypatch.setenv("LOCAL_RANK", rank)
    wait_until_filled(folder, folder / "filled", say=said.append, sleep=clock.sleep, now=clock.now)
    return said, clock.seconds


def test_whoever_waits_for_the_first_process_says_where(tmp_path, monkeypatch):
    done = (tmp_path / "filled").touch
    said, seconds = waiting(monkeypatch, tmp_path, {1300: done})
    minutes = [line.split("waited ")[1].split(" min")[0] for line in said]
    assert seconds == 1300 and minutes == ["1", "11", "21"]
    assert all(str(tmp_path / "filled") in line and "all machines share" in line for line in said)
    assert waiting(monkeypatch, tmp_path, {}) == ([], 0)
    (tmp_path / "filled").unlink()
    assert waiting(monkeypatch, tmp_path, {30: done}) == ([], 30)  # as it usually goes
    (tmp_path / "filled").unlink()
    assert waiting(monkeypatch, tmp_path, {90: done}, "1") == ([], 90)  # one process of a machine is enough


def test_a_disk_that_is_not_shared_ends_the_wait(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    with pytest.raises(UserError, match=r"set data\.cache_dir to a folder that all machines share") as error:
        waiting(monkeypatch, folder, {})
    assert str(folder) in str(error.value)
    said, seconds = waiting(monkeypatch, folder, {590: folder.mkdir, 700: lambda: (folder / "filled").touch()}, "1")
    assert (said, seconds) == ([], 700)
