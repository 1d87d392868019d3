"""Texts for a tower that has none: a small text tower learns to name its frozen regions, or images (LiT, arXiv
2111.07991).

For regions with embeddings r_i and words t_i, the projection W, the text tower T, and r the standardised embedding,

    L = symmetric InfoNCE(W r_i, T(t_i))        (`contrastive_loss`; only W, T and the temperature learn)

LiT locks a tower and trains a text tower on captions of whole images, as `lit_image_texts` does. Regions, their words
and the sizes are ours. What such a text tower reaches is told by what it learned from, too: its figures are named
`lit_...` and stand beside none of a tower that was trained with texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase

from ...train_stages.clip_objective import ClipConfig, text_config
from ...train_stages.contrastive import contrastive_loss
from ...train_stages.normalise import PixelNorm
from ...train_stages.pixels import PixelCache
from ...train_stages.pretrain_data import CaptionTokens
from ...vision_towers import UserError, describe_tower
from ...vision_towers.text_tower import text_states
from .regions import BATCH, ProbeRegions
from .text_side import RegionTexts, TextSide, text_embedder

WARMUP = 0.1  # share of the steps


@dataclass(frozen=True)
class LitConfig:
    """steps: of AdamW, one-cycle schedule. batch_size: pairs in a step, fewer where there are fewer different words.
    lr: the largest learning rate. seed: of weights and batches. text: sizes of the text tower and of the space.
    images: whether `probe` trains one for whole images and their captions, too."""

    steps: int
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0
    text: ClipConfig = field(default_factory=ClipConfig)
    images: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"a text tower cannot learn in {self.steps} steps; give 1 or more.")


class _Lit(nn.Module):
    """What learns: a text tower, both projections and the log of the inverse temperature (CLIP's first value)."""

    def __init__(self, features: Tensor, vocab_size: int, end_id: int, sizes: ClipConfig):
        super().__init__()
        self.mean = nn.Buffer(features.mean(dim=0))
        self.scale = nn.Buffer(1 / features.std(dim=0).clamp(min=1e-6))
        self.region_projection = nn.Linear(features.shape[1], sizes.embed_dim)
        self.text_tower = CLIPTextModel(text_config(sizes, vocab_size, end_id))
        self.text_projection = nn.Linear(sizes.text_hidden, sizes.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def regions(self, features: Tensor) -> Tensor:
        return self.region_projection((features - self.mean) * self.scale)

    def texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.text_projection(text_states(self.text_tower, input_ids, attention_mask))


def lit_texts(
    regions: ProbeRegions,
    words: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    readout: str,
    config: LitConfig,
    device: torch.device | str = "cpu",
) -> RegionTexts:
    """Train a text tower on the embeddings of `regions`, whose classes are places in `words`.

    A step takes different words, and of each a random region: none is a false negative of another, and rare words count
    as much as frequent ones. The same arguments give the same result.

    Args:
        readout: that the embeddings were read by; the space holds it alone.
    Raises:
        UserError: fewer than two different words, or a tokenizer without end or padding token.
    """
    model, tokens = _trained(regions, words, tokenizer, f"a text tower for {readout}", config, device)
    return RegionTexts(text_embedder(model.texts, tokens, torch.device(device)), {readout: model.regions})


def lit_image_texts(
    tower: PreTrainedModel, cache: PixelCache, tokenizer: PreTrainedTokenizerBase, config: LitConfig
) -> TextSide | None:
    """LiT as it was: a text tower learns from whole images and their captions, a step from different captions. None
    where `cache` has fewer than two.

    An image's embedding is the tower's pooled output, or the mean of its patches where it has none.

    Raises:
        UserError: a tokenizer without end or padding token.
    """
    pairs = [(row, caption) for row, record in enumerate(cache.records) for caption in record.captions]
    captions = list(dict.fromkeys(caption for _, caption in pairs))
    if len(captions) < 2:
        return None
    spec, ids = describe_tower(tower.config), {caption: number for number, caption in enumerate(captions)}
    norm = PixelNorm(spec.image_mean, spec.image_std).to(tower.device)

    def pooled(pixels: Tensor) -> Tensor:
        seen = tower(pixels)
        found = getattr(seen, "pooler_output", None)
        return seen.last_hidden_state[:, spec.num_prefix_tokens :].mean(dim=1) if found is None else found

    with torch.inference_mode():
        rows = tqdm(range(0, len(cache), BATCH), "whole images", unit="batch")
        parts = (torch.from_numpy(np.array(cache.pixels[row : row + BATCH])).to(tower.device) for row in rows)
        seen = torch.cat([pooled(norm(part)).float().cpu() for part in parts]).numpy()
    images = np.array([row for row, _ in pairs])
    learned = ProbeRegions(seen[images], np.array([ids[caption] for _, caption in pairs]), images)
    model, tokens = _trained(learned, captions, tokenizer, "a text tower for images", config, tower.device)
    texts = text_embedder(model.texts, tokens, tower.device)
    return TextSide(texts, {}, images=lambda pixels: model.regions(pooled(pixels).float()))


def _trained(
    regions: ProbeRegions,
    words: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    config: LitConfig,
    device: torch.device | str,
) -> tuple[_Lit, CaptionTokens]:
    """The text tower and its projections, trained; and how it reads texts. name: of the progress bar."""
    occurring, counts = np.unique(regions.classes, return_counts=True)
    if len(occurring) < 2:
        raise UserError("a text tower learns from regions with at least two different words, and there are fewer.")
    tokens = CaptionTokens(tokenizer, config.text.max_tokens)
    features = torch.from_numpy(regions.features).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = _Lit(features.cpu(), len(tokenizer), tokens.end_id, config.text).to(device).train()
    by_word = np.argsort(regions.classes, kind="stable")  # the rows of occurring[i] start at first[i]
    first = np.cumsum(counts) - counts
    rows_of_words = [tokens(words[int(label)]) for label in occurring]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps + 1, pct_start=WARMUP)
    rng = np.random.default_rng(config.seed)
    with tqdm(total=config.steps, desc=name, unit="step") as bar:
        for _ in range(config.steps):
            picked = rng.permutation(len(occurring))[: config.batch_size]
            rows = by_word[first[picked] + rng.integers(counts[picked])]
            ids, mask = tokens.pad([rows_of_words[i] for i in picked])
            seen = model.regions(features[torch.from_numpy(rows).to(device)])
            found = contrastive_loss(seen, model.texts(ids.to(device), mask.to(device)), model.logit_scale)
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{found.loss.item():.3f}", refresh=False)
            bar.update()
    return model.eval().requires_grad_(False), tokens
