"""The `data` block of `align` and `instruct`: one set of region records, or several sources that are mixed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from .conversations import DEFAULT_MIX
from .record_source import RecordSource

_STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(gt=0)]

CONVERSATIONS, DATASETS = "conversations", "datasets"  # formats that only a mixture reads
DECODED = "decoded"  # a way to make batches


@dataclass(frozen=True, config=_STRICT)
class MixtureSource(RecordSource):
    """One source of a mixture.

    format: as in `RecordSource`, or "webdataset" (shards of region records or of LLaVA conversations), "conversations"
    (LLaVA's JSON or JSONL, every turn as it stands, with or without an image), or "datasets" (what Hugging Face's
    `datasets` opens: a saved folder, a parquet, arrow or JSON file, or a hub id in `records`).
    weight: how often a sample is drawn from here, compared with the other sources; all of them have one, or none.
    mix, turns: of region records, as in `ConversationData`. split: of a data set.
    stream: read in order, shuffled within `buffer` samples, instead of in any order: for what is far away or
    compressed. It needs a weight.
    """

    weight: Annotated[float, Field(gt=0)] | None = None
    mix: dict[str, float] = Field(default_factory=lambda: dict(DEFAULT_MIX))
    turns: Count = 6
    split: str = "train"
    stream: bool = False
    buffer: Count = 1000

    def __post_init__(self) -> None:
        if self.stream and self.weight is None:
            raise ValueError("a source that is streamed has no size: give it, and all others, a weight")


@dataclass(frozen=True, config=_STRICT)
class MixtureData:
    """Samples drawn from several sources.

    Without weights every sample is drawn once an epoch; with them an epoch is as many draws.

    batches: how samples are put together. "grouped": batches of one modality (with a picture, or text alone) and of
    like lengths. "packed": rows of at most `row_tokens` tokens hold as many samples as fit, which do not see each
    other; `train.batch_size` counts rows. "plain": as they come.
    window: samples that are arranged at a time. max_tokens: longest conversation, image tokens included.
    feature_cache: precision in which the frozen tower's features are kept on the disk, in `cache_dir` (inside the run
    when absent), instead of running it at every step; without one it runs.
    """

    sources: Annotated[tuple[MixtureSource, ...], Field(min_length=1)]
    batches: Literal["grouped", "packed", "plain"] = "grouped"
    row_tokens: Count = 4096
    window: Count = 512
    max_tokens: Count = 2048
    feature_cache: Literal["bf16", "fp32"] | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("give a weight to every source or to none")

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return min(self.max_tokens, self.row_tokens) if self.batches == "packed" else self.max_tokens


@dataclass(frozen=True, config=_STRICT)
class ConversationData(RecordSource):
    """One set of region records, turned into conversations.

    mix: kind of turn -> weight (`conversations.DEFAULT_MIX`). turns: most turns a picture.
    batches: "grouped", "packed" and "plain", and with them `row_tokens`, `window` and `feature_cache`, are those of
    `MixtureData`. "decoded": every picture is decoded once, before training, into `cache_dir` (inside the run when
    absent), and batches are drawn at random: for small pictures that are seen many times.
    max_tokens: longest conversation, image tokens included.
    """

    mix: dict[str, float] = Field(default_factory=lambda: dict(DEFAULT_MIX))
    turns: Count = 6
    batches: Literal["grouped", "packed", "plain", "decoded"] = "grouped"
    row_tokens: Count = 4096
    window: Count = 512
    max_tokens: Count = 1024
    feature_cache: Literal["bf16", "fp32"] | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.batches == DECODED and self.feature_cache is not None:
            raise ValueError("with batches: decoded pixels are kept, not features; feature_cache needs other batches")

    def mixture(self) -> MixtureData:
        """The same as a mixture of one source; what is decoded comes as it is."""
        source = MixtureSource(self.records, self.root, self.format, self.check_images, mix=self.mix, turns=self.turns)
        return MixtureData(
            (source,),
            "plain" if self.batches == DECODED else self.batches,
            row_tokens=self.row_tokens,
            window=self.window,
            max_tokens=self.max_tokens,
            feature_cache=self.feature_cache,
            cache_dir=self.cache_dir,
        )
