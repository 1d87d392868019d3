"""What a tower knows without having learned the classes: regions and images against texts, and texts located."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...mllm.boxes import Boxes
from ...train_stages.conversations import region_words
from ...train_stages.normalise import PixelNorm
from ...train_stages.pixels import PixelCache
from ...vision_towers import TowerSpec
from .classify import Share, share
from .labels import word_labels, words_of
from .prompts import name_texts
from .regions import BATCH, ProbeRegions, Reader, labelled_regions
from .text_side import RegionTexts, TextSide, unit

RANKS = (1, 5, 10)
ASKING_AT_ONCE = 1024


def zero_shot_classes(
    regions: ProbeRegions,
    names: Sequence[str],
    side: RegionTexts,
    readout: str,
    templates: Sequence[str] | None = None,
) -> Share:
    """Share of regions whose nearest class, by cosine, is theirs. names: of the classes, by number. templates: the text
    of a class is the mean over them; its bare name without."""
    if not len(regions) or not names:
        return Share(None, 0, None)
    similarity = in_space(regions, side, readout) @ name_texts(side.texts, names, templates).T
    return share(similarity.argmax(dim=1).numpy() == regions.classes, regions.images, regions.classes)


def region_retrieval(read: Reader, cache: PixelCache, side: RegionTexts, readout: str) -> dict[str, Share]:
    """R@k both ways between all regions with words and their distinct words: whether something with the same words is
    among the k nearest. Keys `text_to_region_r1` ..., `region_to_text_r1` ..."""
    words = words_of(cache.records)
    if not words:
        return {}
    regions = labelled_regions(read, cache, word_labels(words))
    occurring = np.unique(regions.classes)
    seen = in_space(regions, side, readout)
    texts = unit(side.texts([words[i] for i in occurring]))
    # A text stands in no single image: each is a row of its own.
    forth = _recall(texts @ seen.T, occurring, regions.classes, np.arange(len(occurring)))
    back = _recall(seen @ texts.T, regions.classes, occurring, regions.images)
    return _both_ways("text_to_region", forth, "region_to_text", back)


def image_retrieval(cache: PixelCache, side: TextSide, spec: TowerSpec, device: torch.device) -> dict[str, Share]:
    """R@k both ways between images and their first captions; equal captions count as one. Where an image has several
    captions also between images and all of them (`all_captions`).

    Keys `image_to_text_r1` ..., `text_to_image_r1` ..., `image_to_text_all_r1` ..., `text_to_image_all_r1` ...
    """
    rows = [row for row, record in enumerate(cache.records) if record.captions]
    if not rows:
        return {}
    captions = [cache.records[row].captions[0] for row in rows]
    ids = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    labels = np.array([ids[caption] for caption in captions])
    images, texts = _images(cache, rows, side, spec, device), unit(side.texts(list(ids)))
    forth = _recall(images @ texts.T, labels, np.arange(len(ids)), np.array(rows))
    back = _recall(texts @ images.T, np.arange(len(ids)), labels, np.arange(len(ids)))
    found = _both_ways("image_to_text", forth, "text_to_image", back)
    every = [cache.records[row].captions for row in rows]
    return found | (all_captions(images, every, np.array(rows), side) if max(map(len, every)) > 1 else {})


def all_captions(
    images: Tensor, captions: Sequence[Sequence[str]], rows: np.ndarray, side: TextSide
) -> dict[str, Share]:
    """R@k with all captions of an image, as on COCO and Flickr30k (Karpathy's splits): whether one of an image's own is
    among the k nearest of all captions, and, asked by every caption of every image, whether its image is among the k
    nearest images. Equal captions are one text, right with each image that has it.

    images: `(n, J)` of length 1, on the CPU. captions: of each of them, at least one. rows: `(n,)`, for the interval.
    """
    ids = {text: number for number, text in enumerate(dict.fromkeys(text for own in captions for text in own))}
    own = [{ids[text] for text in of_image} for of_image in captions]
    texts = unit(side.texts(list(ids)))
    of_images = [[text in own[image] for text in near] for image, near in enumerate(_nearest(images, texts))]
    of_texts = [[text in own[image] for image in near] for text, near in enumerate(_nearest(texts, images))]
    asking = np.array([ids[text] for of_image in captions for text in of_image])
    their_rows = np.repeat(rows, [len(of_image) for of_image in captions])
    forth, back = _among_first(np.array(of_images), rows), _among_first(np.array(of_texts)[asking], their_rows)
    return _both_ways("image_to_text_all", forth, "text_to_image_all", back)


def image_classes(
    cache: PixelCache, side: TextSide, spec: TowerSpec, device: torch.device, templates: Sequence[str] | None = None
) -> dict[str, Share]:
    """Zero-shot classification of whole images by their records' `tags`: whether one of an image's own is the nearest,
    or among the five nearest, of all tags of `cache`. Keys `image_zero_shot_top1`, `image_zero_shot_top5`. templates:
    as in `zero_shot_classes`."""
    rows = [row for row, record in enumerate(cache.records) if record.tags]
    if not rows:
        return {}
    names = sorted({tag for row in rows for tag in cache.records[row].tags})
    own = torch.tensor([[name in cache.records[row].tags for name in names] for row in rows])
    similarity = _images(cache, rows, side, spec, device) @ name_texts(side.texts, names, templates).T
    nearest = similarity.topk(min(5, len(names)), dim=1).indices
    hits = own.gather(1, nearest).numpy()
    return {f"image_zero_shot_top{k}": share(np.asarray(hits[:, :k].any(axis=1)), np.array(rows)) for k in (1, 5)}


@torch.inference_mode()
def _images(cache: PixelCache, rows: Sequence[int], side: TextSide, spec: TowerSpec, device: torch.device) -> Tensor:
    """Whole images `(n, J)` in the space of the texts, of length 1, on the CPU."""
    norm, found = PixelNorm(spec.image_mean, spec.image_std).to(device), []
    for start in tqdm(range(0, len(rows), BATCH), "whole images", unit="batch"):
        pixels = torch.from_numpy(cache.pixels[list(rows[start : start + BATCH])]).to(device)
        found.append(side.images(norm(pixels)).float())
    return unit(torch.cat(found))


@torch.inference_mode()
def located(cache: PixelCache, side: TextSide, spec: TowerSpec, device: torch.device) -> Share:
    """Share of words that stand at one region of their image whose predicted box has an IoU of at least 0.5 with it."""
    if side.locate is None:
        return Share(None, 0, None)
    norm = PixelNorm(spec.image_mean, spec.image_std).to(device)
    right, images = [], []
    for row, (record, frame) in enumerate(
        zip(tqdm(cache.records, "texts located", unit="img"), cache.frames, strict=True)
    ):
        words = [region_words(region) for region in record.regions]
        boxes, kept = frame.to_input(Boxes([region.box_xyxy for region in record.regions]))
        times = Counter(words)
        single = [place for place, index in enumerate(kept) if words[index] and times[words[index]] == 1]
        if not single:
            continue
        texts = side.texts([words[kept[place]] for place in single])
        found = side.locate(norm(torch.from_numpy(np.array(cache.pixels[row : row + 1])).to(device)), texts)
        truth = Boxes(boxes.xyxy[single])
        # A box head may answer with its corners in the wrong order: no box, IoU 0.
        edges = found.cpu().double().numpy()
        proper = (edges[:, 2:] > edges[:, :2]).all(axis=1)
        overlap = np.zeros(len(edges))
        overlap[proper] = Boxes(edges[proper]).iou(Boxes(truth.xyxy[proper])).diagonal()
        right += (overlap >= 0.5).tolist()
        images += [row] * len(single)
    return share(np.array(right), np.array(images))


def in_space(regions: ProbeRegions, side: RegionTexts, readout: str) -> Tensor:
    """The regions `(N, J)` in the space of the texts, of length 1, on the CPU."""
    with torch.inference_mode():
        project = side.regions[readout]
        device = side.texts(["a"]).device
        return unit(project(torch.from_numpy(regions.features).to(device)))


def _recall(similarity: Tensor, asked: np.ndarray, there: np.ndarray, images: np.ndarray) -> dict[str, Share]:
    """similarity: `(Q, G)`. asked `(Q,)`, there `(G,)`: labels; a hit is an equal one among the k largest."""
    nearest = similarity.topk(min(max(RANKS), similarity.shape[1]), dim=1).indices.numpy()
    return _among_first(there[nearest] == asked[:, None], images)


def _among_first(hits: np.ndarray, images: np.ndarray) -> dict[str, Share]:
    """hits: `(Q, K)`, whether each of the nearest is right, nearest first."""
    return {f"r{k}": share(np.asarray(hits[:, :k].any(axis=1)), images) for k in RANKS}


def _nearest(asking: Tensor, there: Tensor) -> np.ndarray:
    """The places in `there (G, J)` of the nearest to each row of `asking (Q, J)`, nearest first: `(Q, min(10, G))`."""
    most = min(max(RANKS), len(there))
    # Parts, as five captions of every image of a test and its images make half a gigabyte.
    return torch.cat([(part @ there.T).topk(most, dim=1).indices for part in asking.split(ASKING_AT_ONCE)]).numpy()


def _both_ways(forth: str, found: dict[str, Share], back: str, found_back: dict[str, Share]) -> dict[str, Share]:
    named = {f"{forth}_{name}": value for name, value in found.items()}
    return named | {f"{back}_{name}": value for name, value in found_back.items()}
