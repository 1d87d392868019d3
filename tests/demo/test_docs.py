"""The Python example of docs/demo.md runs as printed, and its table names what the server has."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "demo.md").read_text(encoding="utf-8")


def test_the_example_runs_as_printed(server, capsys, monkeypatch):
    """On the server of these tests: what the example starts is that one, and stays open."""
    from regiontower.demo import serve

    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
    monkeypatch.setattr(serve, "launch", lambda sources: server)
    monkeypatch.setattr(serve.Server, "close", lambda self: None)
    exec(compile(block, "docs/demo.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 3 and re.search(r"\[\d.*\] 0?\.\d|\[\d.*\] [01]\.\d+", printed[-1])


def test_the_table_names_every_endpoint_and_argument(server):
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*?)\|.*\|$", PAGE, flags=re.M))
    endpoints = server.app.get_api_info()["named_endpoints"]
    assert set(endpoints) == {f"/{name}" for name in rows}
    for name in ("open_picture", "ask", "similarity", "tokens", "page"):
        parameters = [row["parameter_name"] for row in endpoints[f"/{name}"]["parameters"]]
        said = [word.partition("=")[0] for word in re.findall(r"`([^`]+)`", rows[name]) if word != "data:"]
        assert said == parameters


def test_every_picture_of_the_page_is_there():
    for picture in re.findall(r"\]\((images/[^)]+)\)", PAGE):
        file = Path(__file__).resolve().parents[2] / "docs" / picture
        if not file.is_file():
            pytest.fail(f"{picture} is named and missing")
