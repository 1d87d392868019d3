"""Flickr30k Entities: a phrase of a caption -> the box around all things it means (merged boxes)."""

from __future__ import annotations

from pathlib import Path

from ...mllm.prompts import LOCATE
from ...train_stages.importers.flickr30k import Phrase, read_image_ids, read_phrases
from ...vision_towers.errors import UserError
from ..task_rows import NO_REGION, TaskRow
from .layout import FLICKR_PAGE, need_file, need_folder

OFFICIAL_IMAGES = 1_000  # of val and of test
# A phrase alone ("a man") can mean several things; its caption says which.
IN_CAPTION = 'the "{phrase}" of "{sentence}"'


def flickr30k_rows(root: Path, split: str, *, check_count: bool = True) -> list[TaskRow]:
    """One row for each phrase with boxes of each caption, in order.

    Merged protocol: the true box is the smallest one around all boxes of the phrase's entity, the first box of the
    answer counts at an IoU of 0.5 (recall at 1 in the literature). The question holds the caption, since most phrases
    are not unique without it.

    Args:
        root: data root (`layout`).
        split: "val" or "test".
        check_count: the split must have `OFFICIAL_IMAGES` images.

    Raises:
        Absent: there is no folder `flickr30k`.
        UserError: a file is missing or damaged, or the split has another number of images than the official one.
    """
    folder = need_folder(root / "flickr30k", FLICKR_PAGE)
    path = need_file(folder / f"{split}.txt", FLICKR_PAGE)
    ids = read_image_ids(path)
    if check_count and len(ids) != OFFICIAL_IMAGES:
        raise UserError(
            f"{path}: names {len(ids)} images, the official split has {OFFICIAL_IMAGES}; get it from {FLICKR_PAGE} (or "
            "give data of your own with --data and --format flickr30k)."
        )
    images = folder.absolute() / "images"
    return [_row(images, phrase) for image_id in ids for phrase in read_phrases(folder, image_id)]


def _row(images: Path, phrase: Phrase) -> TaskRow:
    asked = IN_CAPTION.format(phrase=phrase.phrase, sentence=phrase.sentence)
    return TaskRow(
        image=str(images / f"{phrase.image_id}.jpg"),
        width=phrase.width,
        height=phrase.height,
        image_id=phrase.image_id,
        region_index=NO_REGION,
        phrase=asked,
        question=LOCATE.format(phrase=asked),
        prompt_boxes=[],
        target_xyxy=list(phrase.merged_box),
        answers=[],
    )
