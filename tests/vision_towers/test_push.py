"""push_folder: what is asked of the hub, and one sentence for each way it can fail."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from regiontower.vision_towers import UserError, push, push_folder


class FakeApi:
    """Notes what is asked of it; `fails` is raised by the upload."""

    def __init__(self, fails: Exception | None = None):
        self.calls, self.fails = [], fails

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return f"https://hub.test/{repo_id}"

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, *, repo_id, **options):
        self.calls.append(("upload_folder", repo_id, options))
        if self.fails:
            raise self.fails


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "README.md"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_makes_the_repository_and_uploads_the_folder(folder):
    api = FakeApi()
    assert push_folder(folder, "someone/eye", api=api, private=True) == "https://hub.test/someone/eye"
    (made, _, how), (sent, where, what) = api.calls
    assert (made, sent, where) == ("create_repo", "upload_folder", "someone/eye")
    assert how == {"repo_type": "model", "private": True, "exist_ok": True}
    assert what["folder_path"] == folder and what["revision"] is None


def test_a_branch_is_made_before_it_is_written_to(folder):
    api = FakeApi()
    push_folder(folder, "someone/eye", api=api, revision="v2")
    assert [name for name, *_ in api.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert api.calls[1][2] == {"branch": "v2", "exist_ok": True} and api.calls[2][2]["revision"] == "v2"


def test_failures_are_one_sentence_and_keep_the_folder(folder, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    said = {
        "the upload failed": {"api": HfApi(endpoint=closed, token="hf_x")},
        "is no name for a repository": {"api": HfApi(endpoint=closed, token="hf_x"), "repo_id": "a/b/c"},
        "the upload failed .broken pipe.": {"api": FakeApi(ConnectionResetError("broken pipe\nmore"))},
    }
    monkeypatch.setattr(push, "is_offline_mode", lambda: False)
    monkeypatch.setattr(push, "get_token", lambda: None)
    said["there is no token for the hub: run `hf auth login`"] = {}
    for words, options in said.items():
        with pytest.raises(UserError, match=words) as error:
            push_folder(folder, **({"repo_id": "someone/eye"} | options))
        assert "\n" not in str(error.value) and f"kept in {folder}" in str(error.value)
    monkeypatch.setattr(push, "is_offline_mode", lambda: True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push_folder(folder, "someone/eye")


def test_a_refusal_says_what_the_hub_said(folder):
    answer: Any = SimpleNamespace(headers={}, request=None)
    with pytest.raises(UserError, match=r"the hub refused 'someone/eye' \(forbidden\): check the token's rights"):
        push_folder(folder, "someone/eye", api=FakeApi(HfHubHTTPError("forbidden", response=answer)))


def test_a_folder_without_model_or_card_is_not_sent(folder):
    api = FakeApi()
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"has no README\.md"):
        push_folder(folder, "someone/eye", api=api)
    assert not api.calls
