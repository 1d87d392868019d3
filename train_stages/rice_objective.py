"""RICE pre-training as one module: a tower with a region readout, its class centres, and the loss (section 3.3).

Under several processes each holds its part of the centres (Partial FC, `class_shard`).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..vision_towers import describe_tower
from ..vision_towers.errors import UserError
from .class_shard import ClassShard
from .cluster_loss import ClusterLossConfig, LossForm, cluster_discrimination_loss
from .normalise import PixelNorm

CENTRE_STD = 0.01  # as in Partial FC; only the direction of a centre counts
_BLOCK = 4096  # centres that are drawn together


@dataclass(frozen=True)
class RiceConfig:
    """What the region objective is made of.

    object_weight, ocr_weight: factors of the two losses (not in the paper; its authors' later code uses 1 for each).
    ocr_centres: "learned", or "frozen" at their random start (not in the paper).
    row_sparse: gradients of centres hold the drawn classes only, and AdamW moves only those (`RowAdamW`): for large K,
        where a dense step would cost more than all else. Not in the paper; Partial FC does it.
    loss: see `ClusterLossConfig`.
    """

    object_weight: float = 1.0
    ocr_weight: float = 1.0
    ocr_centres: Literal["learned", "frozen"] = "learned"
    row_sparse: bool = False
    loss: ClusterLossConfig = field(default_factory=ClusterLossConfig)

    def __post_init__(self) -> None:
        if self.object_weight < 0 or self.ocr_weight < 0 or not self.object_weight + self.ocr_weight:
            raise UserError("object_weight and ocr_weight must be 0 or more, and not both 0")
        if self.row_sparse and self.loss.sample_rate >= 1:
            raise UserError("model.rice.row_sparse needs model.rice.loss.sample_rate below 1: at 1 all rows take part.")


@dataclass
class ObjectiveOutput(ModelOutput):
    """loss: scalar. metrics: scalars without gradient, by name (absent when the batch has nothing to measure)."""

    loss: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class RiceObjective(nn.Module):
    """The tower and its class centres.

    tower: any tower with a region readout; `region_embeds` are used as they are (the paper states no projection).
    num_objects: K, object classes. num_ocr: V, token classes; 0 leaves OCR regions out. seed: of the centres, which are
    the same for any number of processes.
    The two kinds of region share one loss and have a table of centres each (one table or two: not in the paper).

    `class_shards` tells the engine which rows of the tables this process holds, `row_sparse` which parameters have
    sparse gradients.

    Raises:
        UserError: a tower without a region readout.
    """

    def __init__(self, tower: PreTrainedModel, num_objects: int, num_ocr: int, config: RiceConfig, seed: int = 0):
        super().__init__()
        spec = describe_tower(tower.config)
        if not spec.region_dim:
            raise UserError(f"a {tower.config.model_type} has no region readout; open the tower with load_tower")
        self.tower = tower
        self.settings = config  # Trainer writes into a model's `config`
        self.norm = PixelNorm(spec.image_mean, spec.image_std)
        self.class_shards = {"object_centres": ClassShard.mine(num_objects)}
        if num_ocr:
            self.class_shards["ocr_centres"] = ClassShard.mine(num_ocr)
        tables = [
            new_centres(shard, spec.region_dim, (seed << 1) + number)
            for number, shard in enumerate(self.class_shards.values())
        ]
        self.object_centres = nn.Parameter(tables[0])
        if not num_ocr:
            self.ocr_centres = None
        elif config.ocr_centres == "learned":
            self.ocr_centres = nn.Parameter(tables[1])
        else:
            self.ocr_centres = nn.Buffer(tables[1])
        self.row_sparse = frozenset(self.class_shards) if config.row_sparse else frozenset()

    def forward(
        self,
        pixel_values: Tensor,
        boxes: Tensor,
        region_counts: Tensor,
        object_labels: Tensor,
        ocr_labels: Tensor,
    ) -> ObjectiveOutput:
        """The weighted loss of a batch.

        pixel_values: (B, 3, S, S), uint8, or float already normalised. boxes: (B, R, 4) float32 xyxy in its pixels.
        region_counts: (B,). object_labels: (B, R) int64, -1 = no object class. ocr_labels: (B, R, P >= 1) int64, -1 =
        padding; a row of nothing else is no OCR region. Rows at and beyond `region_counts` carry no label.
        """
        output = self.tower(self.norm(pixel_values), boxes=boxes, region_counts=region_counts)
        embeds = output.region_embeds.flatten(0, 1)
        settings = self.settings
        loss, metrics = embeds.new_zeros((), dtype=torch.float32), {}
        tasks: list[tuple[str, Tensor, Tensor, LossForm, float]] = [
            ("object", self.object_centres, object_labels.flatten()[:, None], "decoupled", settings.object_weight)
        ]
        if self.ocr_centres is not None:
            form = settings.loss.ocr_form
            tasks.append(("ocr", self.ocr_centres, ocr_labels.flatten(0, 1), form, settings.ocr_weight))
        for name, centres, labels, form, weight in tasks:
            rows = (labels >= 0).any(dim=1)
            labels = labels[rows]
            part = cluster_discrimination_loss(
                embeds[rows],
                centres,
                labels,
                labels >= 0,
                settings.loss,
                form=form,
                shard=self.class_shards[f"{name}_centres"],
                row_sparse=settings.row_sparse,
            )
            loss = loss + weight * part.loss
            if part.counted.any():
                metrics[f"{name}_loss"] = part.loss.detach()
                metrics[f"{name}_top1"] = part.correct.float().mean()
        return ObjectiveOutput(loss=loss, metrics=metrics)


def new_centres(shard: ClassShard, dim: int, seed: int) -> Tensor:
    """The shard's rows `(size, D)` of a table of random centres that depends on `seed` alone, not on the shard."""
    rows = []
    for block in range(shard.first // _BLOCK, -(-(shard.first + shard.size) // _BLOCK)):
        generator = torch.Generator().manual_seed((seed << 32) + block)
        values = torch.empty(_BLOCK, dim).normal_(std=CENTRE_STD, generator=generator)
        first = block * _BLOCK
        rows.append(values[max(0, shard.first - first) : shard.first + shard.size - first])
    return torch.cat(rows) if rows else torch.empty(0, dim)
