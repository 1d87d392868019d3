"""Ferret-Bench's judge: a language model behind an OpenAI-compatible endpoint gives two answers a mark each.

You et al. 2023 (arXiv 2310.07704, section 5.4): the judge sees the annotations of the image in words, the question,
GPT-4's answer and the model's, and writes two marks of 1 to 10 on its first line. The score is the sum of the model's
marks
over the sum of GPT-4's. Off unless the user names an endpoint: nothing is sent anywhere otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..vision_towers.errors import UserError
from .response_log import ResponseLog, answer_key
from .task_rows import TaskRow

KEY_VARIABLE = "REGIONTOWER_JUDGE_KEY"
JUDGEMENTS_NAME = "judgements.jsonl"
_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_MARKS = re.compile(r"\s*(\d+(?:\.\d+)?)[\s,]+(\d+(?:\.\d+)?)\s*")
_PAUSES = (1.0, 4.0, 15.0)  # seconds before each further try


@dataclass(frozen=True)
class Judge:
    """An endpoint: `base_url` as OpenAI clients take it ("http://localhost:8000/v1"), the model's name there, and the
    prompt for two answers. The key comes from the environment (`REGIONTOWER_JUDGE_KEY`), never from a file or
    option."""

    base_url: str
    model: str
    timeout: float = 120.0
    pauses: tuple[float, ...] = _PAUSES

    def ask(self, content: str) -> str:
        """The judge's text. Raises UserError when it does not answer after all tries, or refuses."""
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 1024,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        if not url.startswith(("http://", "https://")):
            raise UserError(f"the judge's address is {self.base_url!r}; give it as http://HOST:PORT/v1.")
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        reason = ""
        for pause in (*self.pauses, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    break  # a wrong key or name will not become right
            except (OSError, ValueError, LookupError, TypeError) as error:
                reason = str(error) or type(error).__name__
            if pause is not None:
                time.sleep(pause)
        raise UserError(
            f"the judge {self.model} at {url} did not answer ({reason}); the answers are kept: run it again."
        )


def parse_marks(text: str) -> tuple[float, float] | None:
    """The two marks of a judgement's first line, each 1 to 10, or None when it has no such line."""
    found = _MARKS.fullmatch(text.strip().split("\n")[0])
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None


def judge_prompt(row: TaskRow, answer: str) -> str:
    """What the judge reads about one answer. The row's `context` is JSON: `{"context", "question", "rule", "role"}`."""
    told = json.loads(row.context)
    role = told["role"]
    return (
        f"[Context]\n{told['context']}\n\n[Question]\n{told['question']}\n\n"
        f"[{role} 1]\n{row.answers[0]}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{answer}\n\n[End of {role} 2]\n\n"
        f"[System]\n{told['rule']}\n\n"
    )


def judge_samples(judge: Judge | None, samples: Sequence[dict], rows: Sequence[TaskRow], folder: Path) -> None:
    """Give each sample `score` (the model's mark), `reference_score` (that of the reference answer) and `judged` (there
    are marks); all 0 without a judge. Judgements are logged in `folder`, so none is paid for twice; one that holds no
    marks is asked once more, then left out."""
    log = None if judge is None else ResponseLog(folder / JUDGEMENTS_NAME)
    for sample, row in zip(tqdm(samples, "judge", disable=judge is None), rows, strict=True):
        marks = (
            None
            if judge is None or log is None
            else _marks(judge, log, judge_prompt(row, readable(sample["answer"], row)))
        )
        reference, own = marks or (0.0, 0.0)
        sample |= {"score": own, "reference_score": reference, "judged": marks is not None}


def readable(answer: str, row: TaskRow) -> str:
    """The answer as Ferret's script shows it to the judge: boxes in thousandths become floats from 0 to 1 (grounded
    conversation), or are left out (referring, where the question had the boxes)."""
    keep = "ground" in json.loads(row.context)["category"]

    def restate(found: re.Match[str]) -> str:
        if not keep:
            return ""
        return "[" + ", ".join(f"{int(number) / 1000:.3f}" for number in found[1].split(",")) + "]"

    return re.sub(
        r" ?\[(\s*\d+(?:\s*,\s*\d+){3}\s*)\]", lambda m: (" " if m[0][0] == " " and keep else "") + restate(m), answer
    )


def _marks(judge: Judge, log: ResponseLog, content: str) -> tuple[float, float] | None:
    for attempt in range(2):
        key = answer_key(judge.base_url, judge.model, hashlib.sha256(content.encode()).hexdigest(), attempt)
        if key not in log.answers:
            log.add({key: {"judgement": judge.ask(content)}})
        if marks := parse_marks(log.answers[key]["judgement"]):
            return marks
    return None
