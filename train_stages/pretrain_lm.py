"""Stage 0b: a small language model trained on text alone, so that it knows the language when it is aligned, frozen.

Aligning a projector to an untrained frozen model learns nothing. Here the model learns phrases, questions, answers and
box strings. What it will later see in the image stands before the questions in text form (`data.scene_text`): so it
learns to look up what is asked for and to copy it, which is what the projected image must be able to rely on.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from rich.console import Console
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from ..mllm.boxes import box_format
from ..vision_towers.errors import UserError
from ..vision_towers.packaged import model_source
from .conversations import DEFAULT_MIX, check_mix, corpus_texts, sample_conversation
from .engine import Part, StageResult, run_stage
from .pretrain_heads import vocabulary_hash
from .record_io import data_hash
from .record_source import RecordSource
from .records import Record
from .text_packing import ConversationTexts, PackedTexts, collate_rows
from .tokenizer import BOS_TOKEN, END_TOKEN, PAD_TOKEN, token_id, train_tokenizer
from .train_config import TrainConfig

CORPUS_RECORDS = 5000  # records that a new tokenizer reads at most
_STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=_STRICT)
class LMModelConfig:
    """Sizes of the model (Gemma 3's architecture); the defaults give about 3.5 million parameters."""

    hidden_size: Count = 256
    layers: Count = 6
    heads: Count = 8
    kv_heads: Count = 4
    intermediate_size: Count = 384
    max_positions: Count = 2048
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError("hidden_size must be a multiple of heads, and heads of kv_heads")


@dataclass(frozen=True, config=_STRICT)
class LMDataConfig:
    """Where the text comes from: region records, or `scenes` generated ones (their images are thrown away).

    records, root, format: as in `RecordSource`.
    scenes: how many; their seeds start at `scene_seed`. turns: most turns a conversation. mix: kind of turn -> weight.
    sequence_length: tokens a row, into which conversations are packed. scene_text: probability that the conversation
    begins with the scene in text form. max_regions: larger records are cut to a random part. loss_on: learn the answers
    alone, or every token. tokenizer: a saved one; without it one of `vocab_size` tokens is trained on the same data.
    """

    records: str | tuple[str, ...] | None = None
    root: str | None = None
    format: str = "records"
    scenes: Annotated[int, Field(ge=0)] = 0
    scene_seed: Annotated[int, Field(ge=0)] = 0
    scene_preset: str = "default"
    turns: Count = 6
    mix: dict[str, float] = Field(default_factory=lambda: dict(DEFAULT_MIX))
    sequence_length: Annotated[int, Field(ge=32)] = 1024
    scene_text: Annotated[float, Field(ge=0, le=1)] = 1.0
    max_regions: Count = 12
    loss_on: Literal["answers", "all"] = "answers"
    box_format: str = "int1000"
    tokenizer: str | None = None
    vocab_size: Annotated[int, Field(ge=512)] = 2048

    def __post_init__(self) -> None:
        if bool(self.records) == bool(self.scenes):
            raise ValueError("set either records (files) or scenes (a number of scenes to generate)")


@dataclass(frozen=True, config=_STRICT)
class LMRecipe:
    """The recipe of `pretrain-lm`."""

    data: LMDataConfig
    train: TrainConfig
    model: LMModelConfig = Field(default_factory=LMModelConfig)
    lr: Annotated[float, Field(gt=0)] = 1e-3


def pretrain_lm(recipe: LMRecipe, run_dir: str | Path, device: str = "auto", **options: Any) -> StageResult:
    """Train the language model of `recipe` in `run_dir` (resumed when it holds an unfinished run of the same recipe).

    The finished directory opens with `AutoModelForCausalLM` and `AutoTokenizer`; generation ends at `<|end|>`.
    `options` go to `engine.run_stage`, whose result is returned. Raises `UserError` for a recipe that cannot work.
    """
    check_mix(recipe.data.mix)
    records, hashes = lm_records(recipe.data)
    tokenizer = lm_tokenizer(recipe.data, records)
    texts = ConversationTexts(
        tokenizer,
        box_format(recipe.data.box_format),
        recipe.data.mix,
        turns=recipe.data.turns,
        scene_text=recipe.data.scene_text,
        max_regions=recipe.data.max_regions,
        loss_on=recipe.data.loss_on,
    )
    length = recipe.data.sequence_length
    dataset = PackedTexts(_with_questions(records, recipe.data.mix), texts, length)
    _check_length(dataset)
    model = build_lm(recipe.model, tokenizer, seed=recipe.train.seed)
    model.config.use_cache = False  # with a cache transformers would not see where packed documents begin

    def save(folder: Path) -> None:
        model.config.use_cache = True
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return run_stage(
        model=model,
        parts=[Part("llm", ("",), recipe.lr)],
        dataset=dataset,
        collate=partial(collate_rows, length=length, pad_id=token_id(tokenizer, PAD_TOKEN)),
        train=recipe.train,
        run_dir=Path(run_dir),
        recipe=recipe,
        stage="pretrain-lm",
        parents={},
        data={**hashes, "tokenizer": vocabulary_hash(tokenizer)},
        save=save,
        device=device,
        **options,
    )


def build_lm(config: LMModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Gemma3ForCausalLM:
    """An untrained model (fp32) with the vocabulary of `tokenizer`; `seed` fixes its weights.

    Gemma 3's text architecture, every layer with full attention. Its norms behind attention and MLP, and its scaled
    embeddings, keep the parts of a token in proportion: a small Llama's first block adds vectors many times as long as
    an embedding, and what a projected region or image token holds is lost there.
    """
    bos, end, pad = (token_id(tokenizer, token) for token in (BOS_TOKEN, END_TOKEN, PAD_TOKEN))
    head_dim = config.hidden_size // config.heads
    gemma = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        layer_types=["full_attention"] * config.layers,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=bos,
        eos_token_id=end,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Gemma3ForCausalLM(gemma)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=end, pad_token_id=pad, do_sample=False)
    return model


def lm_records(data: LMDataConfig) -> tuple[list[Record], dict[str, str]]:
    """The records that `data` names, read (a summary goes to stderr) or generated, and their hashes by name."""
    if data.records:
        found = RecordSource(data.records, data.root, data.format).read()
        say = Console(stderr=True).print
        say(f"pretrain-lm: {found.summary()}", markup=False, highlight=False, soft_wrap=True)
        return found.records, {"records": data_hash(found)}
    from .scenes import EVAL_SEED_START, generate_scene

    seeds = range(data.scene_seed, data.scene_seed + data.scenes)
    if seeds.stop > EVAL_SEED_START:
        raise UserError(f"Training scenes have seeds below {EVAL_SEED_START:,}: lower data.scene_seed or data.scenes.")
    scenes = (generate_scene(seed, preset=data.scene_preset) for seed in tqdm(seeds, "scenes", disable=None))
    return [scene.record for scene in scenes], {"scenes": f"{data.scene_preset} {seeds.start}..{seeds.stop}"}


def lm_tokenizer(data: LMDataConfig, records: Sequence[Record]) -> PreTrainedTokenizerBase:
    """The saved tokenizer that `data` names, or a new one trained on the text of `records`."""
    if data.tokenizer:
        try:
            return AutoTokenizer.from_pretrained(model_source(data.tokenizer))
        except (OSError, ValueError) as error:
            raise UserError(f"No tokenizer can be opened at {data.tokenizer}; correct data.tokenizer.") from error
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(tokenizer_corpus(records, data.box_format), folder, data.vocab_size)


def tokenizer_corpus(records: Sequence[Record], boxes: str = "int1000") -> Iterator[str]:
    """The texts of the first `CORPUS_RECORDS` records, with questions, answers and box strings in format `boxes`."""
    rng = random.Random(0)
    for record in records[:CORPUS_RECORDS]:
        yield from corpus_texts(record, rng, box_format(boxes))


def _with_questions(records: Sequence[Record], mix: dict[str, float]) -> list[Record]:
    """The records that some kind of turn can ask about; how many cannot be asked about is said on stderr."""
    usable = [record for record in records if sample_conversation(record, random.Random(0), mix, 1)]
    if not usable:
        raise UserError(f"No record gives a question of the kinds in data.mix ({', '.join(mix)}); change data.mix.")
    if len(usable) < len(records):
        say = Console(stderr=True).print
        say(f"{len(records) - len(usable)} of {len(records)} records have nothing to ask about", highlight=False)
    return usable


def _check_length(dataset: PackedTexts) -> None:
    rng = random.Random(0)
    if not any(dataset.texts(record, rng, dataset.length) for record in dataset.records[:100]):
        raise UserError(f"No conversation fits into data.sequence_length={dataset.length} tokens; raise it.")
