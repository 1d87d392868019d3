import pytest

from regiontower.eval.response_log import ResponseLog, answer_key, log_files
from regiontower.vision_towers.errors import UserError


def test_answers_survive(tmp_path):
    path = tmp_path / "a folder" / "responses.jsonl"
    log = ResponseLog(path)
    log.add({"k1": {"reply": "é\nnew line"}})
    log.add({"k2": {"reply": "b"}, "k3": {"reply": "c"}})
    assert ResponseLog(path).answers == {"k1": {"reply": "é\nnew line"}, "k2": {"reply": "b"}, "k3": {"reply": "c"}}


@pytest.mark.parametrize("half", ['{"key": "k2", "reply": "hal', '{"key": "k2"', "{", '{"reply": "x"}', "[1]"])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, half):
    path = tmp_path / "responses.jsonl"
    ResponseLog(path).add({"k1": {"reply": "a"}})
    with path.open("a") as file:
        file.write(half)
    log = ResponseLog(path)
    assert log.answers == {"k1": {"reply": "a"}}
    log.add({"k2": {"reply": "b"}})
    assert ResponseLog(path).answers == {"k1": {"reply": "a"}, "k2": {"reply": "b"}}


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nmore\n")
    with pytest.raises(UserError, match=r"notes\.txt line 1"):
        ResponseLog(path)
    assert path.read_text() == "my notes\nmore\n"
    with pytest.raises(UserError, match="is a folder"):
        ResponseLog(tmp_path)


def test_each_rank_writes_its_own_file_and_reads_all(tmp_path):
    path = tmp_path / "run [1]*.jsonl"
    for rank in range(3):
        ResponseLog(path, rank).add({f"k{rank}": {"reply": str(rank)}})
    assert [file.name for file in log_files(path)] == [
        "run [1]*.jsonl",
        "run [1]*.rank1.jsonl",
        "run [1]*.rank2.jsonl",
    ]
    for rank in (0, 2, 5):
        assert set(ResponseLog(path, rank).answers) == {"k0", "k1", "k2"}
    (tmp_path / "run [1]*.rank.jsonl").write_text("no log\n")
    (tmp_path / "other.rank1.jsonl").write_text("no log\n")
    assert len(log_files(path)) == 3


def test_keys_depend_on_every_part():
    base = ("task", 3, "Where?", [[1.0, 2.0, 3.0, 4.0]], "image", {"max_new_tokens": 4}, "weights")
    changed = ["task2", 4, "Where is it?", [[1.0, 2.0, 3.0, 5.0]], "image2", {"max_new_tokens": 5}, "weights2"]
    keys = {answer_key(*base[:i], part, *base[i + 1 :]) for i, part in enumerate(changed)}
    assert len(keys | {answer_key(*base)}) == len(base) + 1
    assert answer_key({"a": 1, "b": 2}) == answer_key({"b": 2, "a": 1})
