"""The suites `ocr` and `general`: which of lmms-eval's built-in tasks they run, and on which data."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..vision_towers.errors import UserError


@dataclass(frozen=True)
class BuiltIn:
    """One built-in task of lmms-eval.

    Attributes:
        name: what we call it, and its folder in a data root.
        yaml: its file, inside `lmms_eval/tasks`.
        repository: of its data on the Hugging Face hub. config: which part of that, None for the only one.
        split: the rows that are asked.
        columns: what the task reads of a row.
        metrics: of those the task computes, the ones we report; submissions for a server are left out.
        means: those of them that are the mean of the rows' own scores.
        rows_in_a_block: rows that are scored together and stay together under a limit.
    """

    name: str
    yaml: str
    repository: str
    config: str | None
    split: str
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    means: tuple[str, ...]
    rows_in_a_block: int = 1


_MMSTAR = (
    "coarse perception",
    "fine-grained perception",
    "instance reasoning",
    "logical reasoning",
    "science & technology",
    "math",
    "average",
)
_MMBENCH = ("index", "question", "hint", "answer", "A", "B", "category", "image", "source", "L2-category", "split")
_BUILT_INS = (
    BuiltIn(
        "docvqa",
        "docvqa/docvqa_val.yaml",
        "lmms-lab-encoder/DocVQA",
        "DocVQA",
        "validation",
        ("question", "answers", "image"),
        ("anls",),
        ("anls",),
    ),
    BuiltIn(
        "textvqa",
        "textvqa/textvqa_val.yaml",
        "lmms-lab-encoder/textvqa",
        None,
        "validation",
        ("question_id", "question", "answers", "image"),
        ("exact_match",),
        ("exact_match",),
    ),
    BuiltIn(
        "infovqa",
        "infovqa/infovqa_val.yaml",
        "lmms-lab-encoder/DocVQA",
        "InfographicVQA",
        "validation",
        ("question", "answers", "image"),
        ("anls",),
        ("anls",),
    ),
    BuiltIn(
        "chartqa",
        "chartqa/chartqa.yaml",
        "lmms-lab-encoder/ChartQA",
        None,
        "test",
        ("type", "question", "answer", "image"),
        ("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"),
        ("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"),
    ),
    BuiltIn(
        "ocrbench",
        "ocrbench/ocrbench.yaml",
        "echo840/OCRBench",
        None,
        "test",
        ("dataset", "question", "question_type", "answer", "image"),
        ("ocrbench_accuracy",),
        ("ocrbench_accuracy",),
    ),
    BuiltIn(
        "ai2d",
        "ai2d/ai2d.yaml",
        "lmms-lab-encoder/ai2d",
        None,
        "test",
        ("question", "options", "answer", "image"),
        ("exact_match",),
        ("exact_match",),
    ),
    BuiltIn(
        "mme",
        "mme/mme.yaml",
        "lmms-lab-encoder/MME",
        None,
        "test",
        ("question_id", "image", "question", "answer", "category"),
        ("mme_perception_score", "mme_cognition_score"),
        (),
        rows_in_a_block=2,  # a question and its opposite, one after the other
    ),
    BuiltIn(
        "pope",
        "pope/pope.yaml",
        "lmms-lab-encoder/POPE",
        None,
        "test",
        ("question_id", "question", "answer", "image"),
        ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio"),
        ("pope_accuracy",),
    ),
    BuiltIn(
        # The static one: `mmbench_en_dev` sends answers that it cannot read to OpenAI.
        "mmbench",
        "mmbench/mmbench_en_dev_static.yaml",
        "lmms-lab-encoder/MMBench",
        "en",
        "dev",
        _MMBENCH,
        ("gpt_eval_score",),
        (),
    ),
    BuiltIn(
        "realworldqa",
        "realworldqa/realworldqa.yaml",
        "lmms-lab-encoder/RealWorldQA",
        None,
        "test",
        ("question", "answer", "image"),
        ("exact_match",),
        ("exact_match",),
    ),
    BuiltIn(
        "mmstar",
        "mmstar/mmstar.yaml",
        "Lin-Chen/MMStar",
        None,
        "val",
        ("index", "question", "image", "answer", "category", "l2_category"),
        _MMSTAR,
        (),
    ),
)
BUILT_INS = {task.name: task for task in _BUILT_INS}
SUITES = {
    "ocr": ("docvqa", "textvqa", "infovqa", "chartqa", "ocrbench"),
    "general": ("ai2d", "mme", "pope", "mmbench", "realworldqa", "mmstar"),
}


def suite_tasks(suite: str, tasks: Sequence[str] | None = None) -> list[BuiltIn]:
    """The built-in tasks of a suite, or those of them that are named.

    Raises:
        UserError: an unknown suite, or a task that is not in it.
    """
    if suite not in SUITES:
        raise UserError(f"there is no suite {suite!r} of built-in tasks; choose from {', '.join(SUITES)}")
    for name in tasks or ():
        if name not in SUITES[suite]:
            raise UserError(f"there is no task {name!r} in the suite {suite}; choose from {', '.join(SUITES[suite])}")
    return [BUILT_INS[name] for name in SUITES[suite] if tasks is None or name in tasks]
