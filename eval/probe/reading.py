"""Reading by RICE's text centres: which word of a list has the token classes that a region is nearest to.

    score(word) = mean over c in Omega_word of cos(v, w_c),    Omega_word = set(tokenizer(word))

Not in the paper (arXiv 2507.20025), which reads through a language model: it shows what the tower itself has learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...train_stages.pretrain_heads import CENTRES_FILE, reads_otherwise
from ...train_stages.region_labels import TextClasses
from ...vision_towers import UserError
from .classify import Share, share
from .regions import ProbeRegions


def text_centres(run: str | Path) -> Tensor | None:
    """The text centres `(V, D)` of a finished `pretrain` run; None where there are none."""
    path = Path(run) / CENTRES_FILE
    return load_file(path).get("ocr") if path.is_file() else None


def refuse_another_vocabulary(run: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that `tokenizer` is the one that the text centres of a `pretrain` run stand for: two vocabularies of one
    size would give figures that mean nothing.

    Raises:
        UserError: the run's stage.json knows another vocabulary.
    """
    if reads_otherwise(Path(run), tokenizer):
        raise UserError(
            f"the text centres of {run} were trained with another vocabulary than the tokenizer's; give --tokenizer "
            "the folder that the run's recipe.yaml names as data.tokenizer."
        )


def read_by_tokens(
    texts: ProbeRegions, words: Sequence[str], centres: Tensor, tokenizer: PreTrainedTokenizerBase
) -> Share:
    """Top-1 over `words`; classes of `texts` are their places in it. Words with the same set of tokens cannot be told
    apart: the first of them is the answer.

    Raises:
        UserError: the tokenizer is not the one of the centres.
    """
    if len(tokenizer) != len(centres):
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens and the tower {len(centres)} text centres.")
    if not len(texts):
        return Share(None, 0, None)
    classes = TextClasses(tokenizer)
    member = torch.zeros(len(words), len(centres))
    for row, word in enumerate(words):
        member[row, classes.token_set(word)] = 1
    tokens = member.sum(dim=1)
    member /= tokens[:, None].clamp(min=1)
    similarity = F.normalize(torch.from_numpy(texts.features), dim=-1) @ F.normalize(centres.float(), dim=-1).T
    scores = (similarity @ member.T).masked_fill(tokens == 0, -torch.inf)  # a word without tokens is no answer
    best = scores.argmax(dim=1).numpy()
    return share(np.asarray(best) == texts.classes, texts.images, texts.classes)
