"""The patches of a tower in one space with texts: what an open-vocabulary head starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...train_stages.pixels import PixelCache
from ...train_stages.records import Region
from ...vision_towers import UmgClipVisionModel, UserError
from ..probe.labels import word_labels, words_of
from ..probe.lit import LitConfig, lit_texts
from ..probe.mask_regions import dense_tower
from ..probe.regions import labelled_regions, native, reader
from ..probe.text_side import TextSide

MOST_REGIONS = 30_000  # that a text tower learns from


@dataclass(frozen=True)
class TextSpace:
    """tower: frozen; its dense features `(B, rows, columns, D)` are mapped by `project` `(..., D) -> (..., J)` into the
    space of `texts`, which gives `(n, J)` of n texts. Nothing in it is normalised."""

    tower: UmgClipVisionModel
    project: Callable[[Tensor], Tensor]
    texts: Callable[[Sequence[str]], Tensor]

    def __post_init__(self) -> None:
        for part in (self.tower, self.project):
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    @property
    def joint_dim(self) -> int:
        """J."""
        with torch.no_grad():
            width = self.tower.spec.hidden_size
            return self.project(torch.zeros(1, width, device=self.tower.device)).shape[-1]


def own_text_space(model: PreTrainedModel, side: TextSide | None) -> TextSpace:
    """That of a tower and of the texts that it was trained with, as `open_with_texts` gives them: a `umg_clip` run, a
    native CLIP or SigLIP, or a `clip` run on CLIP or MLCD.

    Raises:
        UserError: a tower whose patches and texts have no common space.
    """
    if side is None:
        raise UserError(
            f"this {model.config.model_type} was trained without texts, and classes of an open vocabulary are texts; "
            "give a umg_clip or clip run, a native CLIP or SigLIP, or --lit-steps and --tokenizer."
        )
    for readout in ("own", "value", "map"):
        tower = dense_tower(model, readout) if readout in side.regions else None
        if tower is not None:
            return TextSpace(tower, side.regions[readout], side.texts)
    raise UserError(
        f"the texts of this {model.config.model_type} are matched with regions and not with patches; give a umg_clip "
        "or clip run, a native CLIP or SigLIP, or --lit-steps and --tokenizer."
    )


def lit_text_space(
    model: PreTrainedModel,
    known: PixelCache,
    learned: Callable[[Region], bool],
    tokenizer: PreTrainedTokenizerBase,
    config: LitConfig,
) -> TextSpace:
    """That of a text tower that learns here, from the `learned` regions of `known` (`lit_texts`), for any CLIP, MLCD or
    SigLIP tower."""
    tower = UmgClipVisionModel.from_native(native(model))
    records = [
        record.model_copy(update={"regions": [region for region in record.regions if learned(region)]})
        for record in known.records
    ]
    cache, words, readout = replace(known, records=records), words_of(records), tower.config.pooling
    regions = labelled_regions(reader(tower, readout), cache, word_labels(words), MOST_REGIONS)
    found = lit_texts(regions, words, tokenizer, readout, config, tower.device)
    return TextSpace(tower, found.regions[readout], found.texts)
