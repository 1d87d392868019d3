"""How well a tower and its class centres name regions that they were not trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..vision_towers import describe_tower
from .normalise import PixelNorm
from .pixels import PixelCache
from .pretrain_data import label_regions
from .region_labels import NO_CLASS, ObjectClasses


@torch.inference_mode()
def object_top1(
    tower: PreTrainedModel, centres: Tensor, cache: PixelCache, classes: ObjectClasses, batch_size: int
) -> dict[str, float]:
    """Share of regions whose nearest class centre (by cosine) is that of their class.

    centres: (K, D), one for each of `classes`. Every region of a class that training knew counts once; the others
    cannot be right and are left out.
    Returns `object_top1` and `regions`, the number of regions; only the latter, 0, when there is none.
    """
    tower.eval()
    spec, device = describe_tower(tower.config), tower.device
    norm = PixelNorm(spec.image_mean, spec.image_std).to(device)
    rows, labelled = label_regions(cache, classes, None)
    centres = F.normalize(centres.to(device).float(), dim=-1)
    right = total = 0
    for start in range(0, len(rows), batch_size):
        batch = labelled[start : start + batch_size]
        pixels = torch.from_numpy(cache.pixels[rows[start : start + batch_size]]).to(device)
        widest = max(len(regions.boxes) for regions in batch)
        boxes = torch.zeros(len(batch), widest, 4)
        labels = torch.full((len(batch), widest), NO_CLASS)
        for i, regions in enumerate(batch):
            boxes[i, : len(regions.boxes)] = regions.boxes.tensor()
            labels[i, : len(regions.boxes)] = torch.from_numpy(regions.objects)
        counts = (labels != NO_CLASS).sum(dim=1)
        output = tower(norm(pixels), boxes=boxes.to(device), region_counts=counts.to(device))
        known = (labels != NO_CLASS).to(device)
        nearest = (F.normalize(output.region_embeds[known].float(), dim=-1) @ centres.T).argmax(dim=1)
        right += int((nearest == labels.to(device)[known]).sum())
        total += len(nearest)
    return {"object_top1": right / total, "regions": total} if total else {"regions": 0}
