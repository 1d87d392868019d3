"""Small mixtures: the same pictures and conversations in files of several kinds, and windows of them."""

import json
from pathlib import Path

from regiontower.train_stages.chat_stream import Windows
from regiontower.train_stages.mixture_recipe import MixtureSource
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import write_scenes

COUNT = 12
TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A star."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "red"},
]
ALONE = [{"from": "human", "value": "Say five."}, {"from": "gpt", "value": "5"}]


def write_sources(folder: Path) -> Path:
    """The same pictures as records and as LLaVA conversations."""
    path = write_scenes(folder, COUNT, 0, preset="easy", progress=False)
    records = read_records(path)
    names = [record.image for record in records.records]
    talks = [{"id": str(n), "image": name, "conversations": TALK} for n, name in enumerate(names)]
    talks += [{"id": "text", "conversations": ALONE}] * 4
    (folder / "talks.json").write_text(json.dumps(talks))
    (folder / "talks.jsonl").write_text("\n\n".join(json.dumps(talk) for talk in talks) + "\n")
    return folder


def source(root, file, **fields):
    return MixtureSource(str(root / file), **fields)


def windows_of(processor, mixture, size=16, seed=0, max_tokens=500):
    return Windows(mixture, processor, max_tokens, size, seed)
