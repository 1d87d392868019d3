"""How well a tower and its class centres name regions that they were not trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .pixels import PixelCache
from .pretrain_data import label_regions
from .region_features import region_features
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
    rows, labelled = label_regions(cache, classes, None)
    centres = F.normalize(centres.to(tower.device).float(), dim=-1)
    right = total = 0
    found = region_features(tower, cache, rows, [regions.boxes for regions in labelled], batch_size)
    for regions, embeds in zip(labelled, found, strict=True):
        known = torch.from_numpy(regions.objects != NO_CLASS)
        nearest = (F.normalize(embeds[known], dim=-1) @ centres.T).argmax(dim=1)
        right += int((nearest.cpu() == torch.from_numpy(regions.objects)[known]).sum())
        total += len(nearest)
    return {"object_top1": right / total, "regions": total} if total else {"regions": 0}
