"""Region-instruction samples whose text lengths follow a published histogram: median 40 tokens, 95 % below 700."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import torch

from regiontower.mllm.boxes import Boxes, box_format
from regiontower.mllm.processing import RegionLlavaProcessor
from regiontower.train_stages.conversation_ids import IGNORED, conversation_ids
from regiontower.train_stages.conversations import RenderedTurn, render_turns, sample_conversation
from regiontower.train_stages.mllm_data import Sample
from regiontower.train_stages.record_io import load_record_image, read_records
from regiontower.train_stages.records import Record

MEDIAN, P95, LONGEST = 40, 700, 1500
_SIGMA = math.log(P95 / MEDIAN) / 1.6449  # of the lognormal distribution with these two points
_ENOUGH = 10_000


def text_lengths(count: int, rng: random.Random, longest: int = LONGEST) -> list[int]:
    """Tokens of text a sample: evenly spaced quantiles of the distribution in random order, so that any number of
    samples has its median and its 95th percentile. The few longer than `longest` are cut."""
    normal = NormalDist(math.log(MEDIAN), _SIGMA)
    lengths = [math.exp(normal.inv_cdf((number + 0.5) / count)) for number in range(count)]
    rng.shuffle(lengths)
    return [min(longest, max(4, round(length))) for length in lengths]


def make_samples(
    records: Path, processor: RegionLlavaProcessor, count: int, seed: int, longest: int = LONGEST
) -> list[Sample]:
    """Real questions and answers about the records' pictures, as many turns as the drawn length takes; what is learned
    is cut to it. Pictures are decoded and texts tokenised: no arm of the benchmark waits for data.
    """
    rng, found = random.Random(seed), read_records(records)
    pixels = [processor.pixels(load_record_image(found.root, record)) for record in found.records]
    samples = []
    for length in text_lengths(count, rng, longest):
        number = rng.randrange(len(found))
        record = found.records[number]
        frame = processor.frame((record.width, record.height))
        image = processor.image_tokens(frame)
        turns = _turns(record, processor, rng, length)
        ids, labels, kept = conversation_ids(processor, turns, frame, _ENOUGH)
        boxes = processor.to_input(Boxes([box for turn in turns[:kept] for box in turn.boxes]), frame)
        ids, labels = ids[: image + length], labels[: image + length]
        if all(label == IGNORED for label in labels):  # cut before its first answer: something has to be learned
            labels[-1] = ids[-1]
        boxes = boxes[: ids.count(processor.region_token_id)]
        samples.append(Sample(ids, labels, pixels[number], boxes, size=frame.original_size))
    return samples


def _turns(record: Record, processor: RegionLlavaProcessor, rng: random.Random, length: int) -> Sequence[RenderedTurn]:
    """Turns of more than `length` tokens."""
    frame, written = processor.frame((record.width, record.height)), box_format(processor.box_format)
    turns: list[RenderedTurn] = []
    while len(turns) < 2 or 4 * len(turns) < length:  # a turn has more than four tokens
        turns += render_turns(sample_conversation(record, rng, turns=8), written, frame)
    return turns


def real_and_padded(batch: dict[str, torch.Tensor], pad_id: int) -> tuple[int, int]:
    """Tokens of a batch without and with padding. Samples hold no padding token of their own."""
    return int((batch["input_ids"] != pad_id).sum()), batch["input_ids"].numel()
