"""What can be asked and how each kind of question is scored: names of tasks, kinds, metrics, what they average."""

from collections.abc import Sequence

from ..vision_towers.errors import UserError

PREFIX = "regiontower_"  # lmms-eval's own names win over ours, so ours must be ours alone

# Task name -> kind. These four are asked of any file of region records when nothing else is said.
TASKS = {PREFIX + kind: kind for kind in ("grounding", "referring", "reading", "absent")}

# Further ones for region records; the suite `grounding` asks them all.
MORE_TASKS = {
    PREFIX + name: kind
    for name, kind in {
        "several": "several",
        "counting": "counting",
        "text_grounding": "grounding",
        "classify_box": "classification",
        "classify_point": "classification",
        "classify_shape": "classification",
        "captioning": "captioning",
    }.items()
}
RECORD_TASKS = TASKS | MORE_TASKS

# Those of published benchmarks, made from their official files (`datasets`).
OFFICIAL_TASKS = {
    PREFIX + name: kind
    for name, kind in {
        "refcoco_val": "grounding",
        "refcoco_testA": "grounding",
        "refcoco_testB": "grounding",
        "refcoco+_val": "grounding",
        "refcoco+_testA": "grounding",
        "refcoco+_testB": "grounding",
        "refcocog_val": "grounding",
        "refcocog_test": "grounding",
        "flickr30k_val": "grounding",
        "flickr30k_test": "grounding",
        "reflvis_box": "classification",
        "reflvis_point": "classification",
        "reflvis_shape": "classification",
        "ferret_bench_refer_desc": "judged",
        "ferret_bench_refer_reason": "judged",
        "ferret_bench_ground_conv": "judged",
    }.items()
}
ALL_TASKS = RECORD_TASKS | OFFICIAL_TASKS

# kind -> metric -> the field of a sample that it averages, or (field, field): the sum of one over the sum of the other.
METRICS: dict[str, dict[str, str | tuple[str, str]]] = {
    "grounding": {"acc50": "correct", "miou": "iou", "parse_rate": "parsed"},
    "referring": {"em": "correct"},
    "reading": {"em": "correct"},
    "absent": {"rejection": "correct"},
    "several": {
        "precision": ("found", "predicted"),
        "recall": ("found", "true"),
        "f1": ("twice_found", "predicted_and_true"),
        "exact": "correct",
        "parse_rate": "parsed",
    },
    "counting": {
        "count_acc": "correct",
        "mae": "count_error",
        "precision": ("found", "predicted"),
        "recall": ("found", "true"),
    },
    "classification": {"acc": "correct", "acc_ferret": "named"},
    "captioning": {"cider": "cider", "rouge_l": "rouge_l"},
    "judged": {"relative_score": ("score", "reference_score"), "judged": "judged"},
}
# kind -> the metric that stands for it where there is room for one.
HEADLINES = {kind: next(iter(metrics)) for kind, metrics in METRICS.items()} | {"several": "f1"}
# Metrics of boxes that carry scores (`confidence`).
SCORED_METRICS = ("ap50", "ece")
MEANINGS = {
    "acc50": "share of answers whose first box has an IoU of at least 0.5 with the true one",
    "miou": "mean IoU of the first box with the true one; 0 without a readable box",
    "parse_rate": "share of answers from which a box could be read",
    "em": "share of answers that match exactly after folding case and white space",
    "rejection": "share of answers without a box where nothing fits",
    "precision": "share of the given boxes that found a true one (IoU at least 0.5)",
    "recall": "share of the true boxes that were found",
    "f1": "harmonic mean of precision and recall",
    "exact": "share of answers with every true box and no other",
    "count_acc": "share of answers with the right number of boxes, wherever they are",
    "mae": "mean distance from the right number",
    "acc": "share of answers that give the right one of two names, and not the other",
    "acc_ferret": "share of answers in which the right name stands somewhere, as Ferret counts",
    "cider": "CIDEr-D of the description, 0 to 10",
    "rouge_l": "ROUGE-L of the description",
    "relative_score": "the judge's marks over its marks for the reference answers",
    "judged": "share of answers that got marks",
    "ap50": "area under precision over recall, boxes ranked by their scores",
    "ece": "mean distance between a box's score and the share of right boxes of like score",
}
# Metrics of which less is better; of all others more is.
LOWER_IS_BETTER = frozenset({"mae", "ece"})
# Metrics that are no share, so that Wilson's interval does not apply.
UNBOUNDED = frozenset({"mae", "cider", "relative_score"})

# Kinds whose answer is boxes, or that there is none.
BOX_KINDS = frozenset({"grounding", "absent", "several", "counting"})


def task_names(tasks: Sequence[str] | None, known: dict[str, str] = RECORD_TASKS) -> list[str]:
    """The asked tasks without repeats; the four of `TASKS` for None. "grounding" is short for "regiontower_grounding".

    A UserError on an unknown name lists the known ones.
    """
    names = list(dict.fromkeys(_full_name(name, known) for name in tasks)) if tasks is not None else list(TASKS)
    for name in names:
        if name not in known:
            raise UserError(f"there is no task {name!r}; choose from {', '.join(known)}")
    return names


def _full_name(name: str, known: dict[str, str]) -> str:
    return PREFIX + name if PREFIX + name in known else name
