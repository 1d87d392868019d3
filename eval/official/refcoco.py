"""RefCOCO, RefCOCO+ and RefCOCOg: one row a sentence of the official splits, counted before anything is asked."""

from __future__ import annotations

from pathlib import Path

from ...mllm.prompts import LOCATE
from ...train_stages.importers.refcoco import read_expressions
from ...vision_towers.errors import UserError
from ..task_rows import TaskRow
from .layout import REFER_PAGE, need_file, need_folder

# Which partition published figures use: UNC's, and UMD's for RefCOCOg.
PARTITIONS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
# Sentences of each split.
OFFICIAL_COUNTS = {
    ("refcoco", "val"): 10_834,
    ("refcoco", "testA"): 5_657,
    ("refcoco", "testB"): 5_095,
    ("refcoco+", "val"): 10_758,
    ("refcoco+", "testA"): 5_726,
    ("refcoco+", "testB"): 4_889,
    ("refcocog", "val"): 4_896,
    ("refcocog", "test"): 9_602,
}


def refcoco_rows(root: Path, name: str, split: str, *, check_count: bool = True) -> list[TaskRow]:
    """One row for each sentence of a split, in the order of the file.

    A sentence that two refs share stays twice, as in all published figures. The question is `prompts.LOCATE`.

    Args:
        root: data root (`layout`).
        name: "refcoco", "refcoco+" or "refcocog".
        split: "val", "testA", "testB"; of refcocog "val" or "test".
        check_count: compare with `OFFICIAL_COUNTS`.

    Raises:
        Absent: there is no folder of that name.
        UserError: a file is missing, or the split has another number of sentences than the official one.
    """
    folder = need_folder(root / name, REFER_PAGE)
    path = need_file(folder / f"refs({PARTITIONS[name]}).p", REFER_PAGE)
    found = read_expressions(path, split)
    official = OFFICIAL_COUNTS[name, split]
    if check_count and len(found) != official:
        raise UserError(
            f"{path}: the split {split} has {len(found)} sentences, the official one has {official}; get the file from "
            f"{REFER_PAGE} (or give data of your own as region records with --data and --format refcoco)."
        )
    images = root.absolute() / "train2014"
    return [
        TaskRow(
            image=str(images / item.image),
            width=item.width,
            height=item.height,
            image_id=item.image,
            region_index=item.ann_id,
            phrase=item.sentence,
            question=LOCATE.format(phrase=item.sentence),
            prompt_boxes=[],
            target_xyxy=list(item.box_xyxy),
            answers=[],
            distractors=item.others,
        )
        for item in found
    ]
