"""What stage 0 measures on records that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..vision_towers.errors import UserError
from .engine.seeded_data import SeededCollate, SeededDataset
from .gather import sum_over_processes, world
from .objective_task import Task
from .pixels import PixelCache
from .pretrain_data import labelled_regions
from .pretrain_items import CachedItems
from .region_features import region_features
from .region_labels import NO_CLASS, ObjectClasses

Probe = Callable[[PreTrainedModel, PixelCache], dict[str, float]]


def held_out_figures(
    task: Task, cache: PixelCache, batch_size: int, probe: Probe | None = None
) -> Callable[[], dict[str, float]]:
    """What measures the model of `task` as it is: `loss`, the objective's on `cache` with the same random draws every
    time; `object_top1` and `regions` where there are class centres (`object_top1` below); and what `probe` finds.

    A batch of the loss is of `batch_size` images, full ones as far as there is one, whatever the number of processes:
    they share it, and contrast is over all of them. Every process has to measure.

    Raises:
        UserError: no image is of use to the objective, or a batch has fewer images than there are processes.
    """
    try:
        items = CachedItems(cache, task.items)
    except UserError as error:
        raise UserError(f"eval.records: {error}") from None
    shared, processes = min(batch_size, len(items)), _place()[1]
    if shared < processes:
        raise UserError(
            f"{processes} processes cannot share a batch of {shared} held-out images: raise eval.batch_size or give "
            "more images in eval.records."
        )

    def measure() -> dict[str, float]:
        found = _loss(task, items, batch_size)
        if task.classes is not None and task.centres is not None:
            found |= object_top1(task.regions, task.centres()["object"], cache, task.classes, batch_size)
        return found | (probe(task.regions, cache) if probe is not None else {})

    return measure


@torch.inference_mode()
def _loss(task: Task, items: CachedItems, batch_size: int) -> dict[str, float]:
    rank, processes = _place()
    device = next(task.objective.parameters()).device
    size = min(batch_size, len(items))
    batches = len(items) // size  # full ones, because contrast depends on their size
    mine = range(size * rank // processes, size * (rank + 1) // processes)
    shares = [[size * number + row for row in mine] for number in range(batches)]
    collate = SeededCollate(task.items.collate)
    loader = DataLoader(SeededDataset(items, 0), batch_sampler=shares, collate_fn=collate)
    # Sampled negatives. The engine puts the CPU's generator back; torch.manual_seed would also reseed every GPU.
    torch.default_generator.manual_seed(0)
    total = 0.0
    for batch in loader:
        total += float(task.objective(**{name: value.to(device) for name, value in batch.items()}).loss)
    # The mean of a loss over processes is that of the whole batch.
    (total,) = sum_over_processes([total], device)
    return {"loss": total / (batches * processes)}


def _place() -> tuple[int, int]:
    """Rank and number of processes."""
    group = world()
    return (0, 1) if group is None else (group.rank(), group.size())


@torch.inference_mode()
def object_top1(
    tower: PreTrainedModel, centres: Tensor, cache: PixelCache, classes: ObjectClasses, batch_size: int
) -> dict[str, float]:
    """Share of regions whose nearest class centre (by cosine) is that of their class.

    centres: (K, D), one for each of `classes`. Every region of a class that training knew counts once; the others
    cannot be right and are left out.
    Returns `object_top1` and `regions`, the number of regions; only the latter, 0, when there is none.
    """
    images = zip(cache.records, cache.frames, strict=True)
    known = [labelled_regions(record, frame, classes, None) for record, frame in images]
    rows = {row: regions for row, regions in enumerate(known) if regions is not None}
    boxes = [regions.boxes for regions in rows.values()]
    centres = F.normalize(centres.to(tower.device).float(), dim=-1)
    right = total = 0
    found = region_features(tower, cache, list(rows), boxes, batch_size, None)
    for regions, embeds in zip(rows.values(), found, strict=True):
        has_class = torch.from_numpy(regions.objects != NO_CLASS)
        nearest = (F.normalize(embeds[has_class], dim=-1) @ centres.T).argmax(dim=1)
        right += int((nearest.cpu() == torch.from_numpy(regions.objects)[has_class]).sum())
        total += len(nearest)
    return {"object_top1": right / total, "regions": total} if total else {"regions": 0}
