"""What a recipe's samples look like to the model: which tokens are learned, how long they are, how they share rows.

A template that does not fit its tokenizer, or a limit that cuts every answer off, shows in no error message: the loss
is 0, or falls and means nothing.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from ..mllm import load_with_regions
from ..mllm.findings import Finding
from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers import load_tower
from ..vision_towers.errors import CANNOT_OPEN, UserError, in_one_line
from ..vision_towers.pack_rows import pack_rows
from ..vision_towers.packaged import model_source
from .bad_records import name_bad
from .chat_samples import Encoded, Unusable, encode
from .chat_stream import Tally, grouped
from .check_recipe import read_stage_recipe
from .conversation_ids import IGNORED, ends_answers
from .mixture import open_mixture
from .mixture_recipe import MixtureData
from .mllm_stage import AlignModel, AlignRecipe, InstructRecipe, put_together

MASKED = 0.01  # share of samples of which nothing is learned that is an error
_LEARNED = ("⟦", "⟧")  # around what is learned, where there are no colours


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of a sample that are all learned, or all not. text: a run of image tokens is written once."""

    text: str
    tokens: int
    learned: bool


@dataclass(frozen=True)
class BatchReport:
    """looked: samples drawn; tally: what became of them. tokens, learned: of all that can be used. lengths: median,
    95th percentile and longest sample, in tokens. padding: padded over real tokens of batches as they come, and
    grouped. per_row: samples that share a row, packed. samples: the pieces of the first few."""

    looked: int
    masked: int
    bad: int
    silent: int
    tokens: int
    learned: int
    lengths: dict[str, int]
    padding: dict[str, float]
    per_row: float
    samples: list[list[Piece]]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def look_at_samples(
    source: str | Path, overrides: Sequence[str] = (), count: int = 200, shown: int = 3
) -> tuple[BatchReport, list[Finding]]:
    """Encode samples of a recipe of `align` or `instruct`; no picture is decoded, no language model is loaded.

    Args:
        source, overrides: as of `load_recipe`. count: samples looked at. shown: of them, in the report.
    Raises:
        UserError: a model or data that cannot be opened, or none of the samples can be used.
    """
    recipe = read_stage_recipe(source, overrides)
    processor = recipe_processor(recipe)
    data = recipe.data if isinstance(recipe.data, MixtureData) else recipe.data.mixture()
    mixture = open_mixture(data.sources, recipe.train.seed)
    tally, samples = Tally(), []
    for place in range(count):
        tally.seen += 1
        try:
            rng = random.Random(f"{recipe.train.seed} {place}")
            samples.append(encode(mixture[place], processor, data.longest, rng))
        except Unusable as error:
            tally.record(error)
    if not samples:
        raise UserError(f"none of {count} samples can be learned from ({tally.summary()}).")
    report = BatchReport(
        looked=count,
        masked=len(tally.masked),
        bad=len(tally.bad),
        silent=tally.silent,
        tokens=sum(len(sample.ids) for sample in samples),
        learned=sum(label != IGNORED for sample in samples for label in sample.labels),
        lengths=_lengths(samples),
        padding=_padding(samples, recipe.train.batch_size),
        per_row=round(len(samples) / len(pack_rows([len(sample.ids) for sample in samples], data.row_tokens)), 2),
        samples=[pieces(sample, processor) for sample in samples[:shown]],
    )
    return report, list(_findings(report, tally, processor))


def pieces(sample: Encoded, processor: RegionLlavaProcessor) -> list[Piece]:
    """The text of a sample, cut where learning begins and ends."""
    found: list[Piece] = []
    start = 0
    for end in range(1, len(sample.ids) + 1):
        learned = sample.labels[start] != IGNORED
        if end == len(sample.ids) or (sample.labels[end] != IGNORED) != learned:
            found.append(Piece(_written(sample.ids[start:end], processor), end - start, learned))
            start = end
    return found


def print_samples(report: BatchReport) -> None:
    """On stderr, what is learned in colour where there are colours."""
    text = Text()
    for number, sample in enumerate(report.samples, 1):
        text.append(f"sample {number}\n", style="bold")
        for piece in sample:
            if piece.learned:
                text.append(f"{_LEARNED[0]}{piece.text}{_LEARNED[1]}", style="bold green")
            else:
                text.append(piece.text, style="dim")
        text.append("\n\n")
    share = 100 * report.learned / report.tokens
    lengths, padding = report.lengths, report.padding
    text.append(
        f"{report.looked} samples looked at: {report.masked} of which nothing is learned, {report.bad} bad, "
        f"{report.silent} without a question\n"
        f"{share:.1f} % of {report.tokens} tokens are learned (in {_LEARNED[0]} {_LEARNED[1]})\n"
        f"tokens a sample: median {lengths['median']}, 95 % below {lengths['p95']}, longest {lengths['longest']}\n"
        f"padded over real tokens: {padding['plain']:.2f} as they come, {padding['grouped']:.2f} grouped; packed, "
        f"{report.per_row:.1f} samples share a row without padding"
    )
    Console(stderr=True).print(text, soft_wrap=True)


def recipe_processor(recipe: AlignRecipe | InstructRecipe) -> RegionLlavaProcessor:
    """The processor that a run would have.

    Raises:
        UserError: a model that cannot be opened.
    """
    model = recipe.model
    if not isinstance(model, AlignModel):
        try:
            processor: Any = AutoProcessor.from_pretrained(model_source(model.mllm))
        except CANNOT_OPEN as error:
            raise UserError(f"no model can be opened at {model.mllm!r}: {in_one_line(error)}") from error
        return processor if isinstance(processor, RegionLlavaProcessor) else load_with_regions(model.mllm)[1]
    source = model_source(model.language_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config: Any = AutoConfig.from_pretrained(source)
    except CANNOT_OPEN as error:
        raise UserError(f"no language model can be opened at {source!r}: {in_one_line(error)}") from error
    config.vocab_size = max(config.vocab_size, len(tokenizer) + 2)  # rows are not made for new tokens without weights
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config)
    return put_together(model, load_tower(model.tower), language_model, tokenizer)[1]


def _findings(report: BatchReport, tally: Tally, processor: RegionLlavaProcessor) -> Iterator[Finding]:
    if report.masked > MASKED * report.looked:
        yield Finding(
            "error",
            f"of {report.masked} of {report.looked} samples no token is learned",
            "they cost as much as others and teach nothing",
            f"look at the first ones: {name_bad(tally.masked)}",
        )
    if report.bad > max(5, report.looked / 100):
        yield Finding(
            "error", f"{report.bad} of {report.looked} samples are bad", "training stops", name_bad(tally.bad)
        )
    if not ends_answers(processor):
        yield Finding(
            "warning",
            "the chat template puts no special token behind an answer",
            "the model never learns to stop",
            "use a template that writes the tokenizer's end of text, such as model.chat_template=vicuna",
        )


def _written(ids: list[int], processor: RegionLlavaProcessor) -> str:
    image, parts, at = processor.image_token_id, [], 0
    while at < len(ids):
        end = at
        while end < len(ids) and (ids[end] == image) == (ids[at] == image):
            end += 1
        run = ids[at:end]
        parts.append(f"{processor.image_token}x{len(run)}" if run[0] == image else processor.tokenizer.decode(run))
        at = end
    return "".join(parts)


def _lengths(samples: list[Encoded]) -> dict[str, int]:
    lengths = sorted(len(sample.ids) for sample in samples)
    p95 = lengths[min(len(lengths) - 1, round(0.95 * len(lengths)))]
    return {"median": int(statistics.median(lengths)), "p95": p95, "longest": lengths[-1]}


def _padding(samples: list[Encoded], batch: int) -> dict[str, float]:
    """Padded over real tokens, of whole batches."""
    whole = samples[: len(samples) - len(samples) % batch] or samples
    batch = min(batch, len(whole))
    grouped_rows = [row[0] for row in grouped(whole, random.Random(0), batch)]
    real = sum(len(sample.ids) for sample in whole)
    ways = {"plain": _padded(whole, batch), "grouped": _padded(grouped_rows, batch)}
    return {name: round(padded / real, 3) for name, padded in ways.items()}


def _padded(samples: list[Encoded], batch: int) -> int:
    lengths = [len(sample.ids) for sample in samples]
    return sum(batch * max(lengths[start : start + batch]) for start in range(0, len(lengths), batch))
