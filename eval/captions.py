"""Scores of descriptions: CIDEr-D and ROUGE-L, both without Java.

CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726) and ROUGE-L are pycocoevalcap's. Its tokenizer and METEOR are Java
programs: words are split here instead, so figures may differ from published ones in the third digit, and METEOR is not
given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..train_stages.phrases import normalise_phrase

_WORD = re.compile(r"\w+(?:['’]\w+)?")


def words(text: str) -> str:
    """The words of a text in lower case, one space between them, punctuation dropped."""
    return " ".join(_WORD.findall(normalise_phrase(text)))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L (F with beta 1.2, best precision and best recall over the references), 0..1. An empty answer scores 0."""
    from pycocoevalcap.rouge.rouge import Rouge

    said = words(answer)
    return float(Rouge().calc_score([said], [words(text) for text in references])) if said else 0.0


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer, 0..10; published figures are 100 times the mean. How rare a word is, is counted over the
    references of all rows, so a row's score depends on the others."""
    from pycocoevalcap.cider.cider import Cider

    if not answers:
        return []
    said = {index: [words(answer)] for index, answer in enumerate(answers)}
    true = {index: [words(text) for text in texts] for index, texts in enumerate(references)}
    _, scores = Cider().compute_score(true, said)
    return [float(score) for score in scores]
