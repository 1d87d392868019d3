"""What a process that loads data has to say to the user is the sentence that the training process would say."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_runs import NO_FORK, small_run

from regiontower.train_stages.conversation_ids import TooLong
from regiontower.train_stages.engine import StreamedDataset
from regiontower.vision_towers.errors import UserError

pytestmark = pytest.mark.skipif(NO_FORK, reason="needs fork")
SENTENCE = "item {} does not fit; raise data.max_tokens."


def item(index):
    if index % 12 == 7:
        raise TooLong(SENTENCE.format(7))
    return torch.full((4,), float(index))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return item(index)


class Stream(StreamedDataset):
    def examples(self, rank, processes):
        return itertools.count(rank, processes)

    def item(self, example):
        return item(example)


def stack(items):
    return {"x": torch.stack(items)}


def of_one_size(items):
    raise UserError("pictures of one batch have several sizes; set train.batch_size=1.")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dataset": Rows(), "collate": stack}, SENTENCE.format(7)),
        ({"dataset": Stream(), "collate": stack}, SENTENCE.format(7)),
        ({"collate": of_one_size}, "pictures of one batch have several sizes; set train.batch_size=1."),
    ],
    ids=["rows", "stream", "collate"],
)
def test_a_mistake_is_one_sentence_wherever_it_shows(tmp_path, options, sentence, workers):
    with pytest.raises(UserError) as caught:
        small_run(tmp_path / "run", options=options, workers=workers)
    assert str(caught.value) == sentence


def test_every_other_exception_keeps_its_traceback(tmp_path):
    def broken(items):
        raise KeyError("x")

    with pytest.raises(KeyError, match="Original Traceback"):
        small_run(tmp_path / "run", options={"collate": broken}, workers=1)
