"""Any model class of lmms-eval on our tasks: opened with its own arguments, asked in its declared convention,
resumable."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..vision_towers.errors import UserError
from .conventions import Convention
from .fingerprint import weights_hash
from .response_log import ResponseLog, answer_key

PIECE = 32  # requests that are asked, and logged, together
# What lmms-eval's classes write instead of an answer when a request failed.
_FAILED = "[LMMS_EVAL_REQUEST_FAILED"


@dataclass(frozen=True)
class ForeignModel:
    """A model class of lmms-eval: its id (`qwen2_5_vl`, `llava_hf`, `vllm`, `openai`, ...), its model arguments
    ("pretrained=DIR,device_map=cpu"), and the convention it answers in."""

    model_class: str
    arguments: str
    convention: Convention

    def __str__(self) -> str:
        return f"{self.model_class}:{self.arguments}" if self.arguments else self.model_class


def open_foreign(
    model: ForeignModel, log: Path, *, device: str, batch_size: int, progress: bool = True
) -> AskedInPieces:
    """Open the model and put the response log before it.

    device: handed over unless it is "auto", or the arguments name one, or the class takes none.

    Raises:
        UserError: lmms-eval has no such class, or it cannot be imported or opened here.
    """
    kind = model_class(model.model_class)
    given = {pair.partition("=")[0] for pair in model.arguments.split(",")}
    takes = set(inspect.signature(kind.__init__).parameters)
    further = {"batch_size": batch_size, "device": None if device == "auto" else device}
    further = {name: value for name, value in further.items() if name in takes - given and value is not None}
    try:
        opened = kind.create_from_arg_string(model.arguments, further)
    except Exception as error:
        raise UserError(f"{model} cannot be opened ({_one_line(error)}); check its model arguments.") from error
    return AskedInPieces(opened, model, ResponseLog(log), progress)


def model_class(model_id: str) -> type[lmms]:
    """lmms-eval's class of that id, its chat class where there is one.

    Raises:
        UserError: lmms-eval has no such class, or it cannot be imported here.
    """
    from lmms_eval.models import get_model

    try:
        return get_model(model_id)
    except Exception as error:  # an unknown id, or an import that fails: each class of lmms-eval has its own needs
        raise UserError(
            f"lmms-eval's model {model_id!r} cannot be loaded ({_one_line(error)}); see the ids with lmms-eval models, "
            "and install what it imports (several need lmms-eval[video-legacy])."
        ) from error


class AskedInPieces(lmms):
    """Another model, asked `PIECE` requests at a time, each answer logged before the next piece: lmms-eval itself keeps
    nothing until every answer is in. An answer is reused for the same row, picture file, generation settings, model
    arguments and weights.

    A class that turns an error into an empty answer, or into a message, gets no score for it: failures end the run.
    """

    def __init__(self, inner: lmms, model: ForeignModel, log: ResponseLog, progress: bool = True) -> None:
        super().__init__()
        self.inner, self.model_name, self.log = inner, str(model), log
        self.is_simple = inner.is_simple  # pyright: ignore[reportAttributeAccessIssue] - a class attribute of theirs
        self.task_dict = inner.task_dict
        self._rank, self._world_size = inner.rank, inner.world_size
        self._progress = progress
        module = getattr(inner, "model", None)
        self.module = module if hasattr(module, "state_dict") else None
        self.weights_hash = None if self.module is None else weights_hash(self.module)
        self._files: dict[str, str] = {}

    def clean(self) -> None:
        """Nothing: lmms-eval's own deletes the model, which further tasks still need."""

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests."""
        keys = [self._key(request) for request in requests]
        missing = list(
            {key: request for key, request in zip(keys, requests, strict=True) if key not in self.log.answers}.items()
        )
        with tqdm(total=len(missing), desc="answers", disable=not self._progress or self._rank != 0) as bar:
            for start in range(0, len(missing), PIECE):
                piece = missing[start : start + PIECE]
                replies = [_text(reply) for reply in self.inner.generate_until([request for _, request in piece])]
                _refuse_failures(self.model_name, replies)
                self.log.add(
                    {
                        key: {"task": request.task_name, "doc_id": request.doc_id, "answer": reply, "reply": reply}
                        for (key, request), reply in zip(piece, replies, strict=True)
                    }
                )
                bar.update(len(piece))
        return [self.log.answers[key]["reply"] for key in keys]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported: our tasks have one round."""
        raise UserError("tasks of several rounds are not supported here")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Handed on as it is."""
        return self.inner.loglikelihood(requests)  # pyright: ignore[reportArgumentType]

    def _key(self, request: Instance) -> str:
        arguments: tuple[Any, ...] = tuple(request.args)
        generation = next(value for value in arguments if isinstance(value, dict))
        *_, doc_id, task, split = arguments
        doc: Mapping = self.task_dict[task][split][doc_id]
        picture = self._file_hash(doc["image"])
        return answer_key(task, doc_id, dict(doc), picture, generation, self.model_name, self.weights_hash)

    def _file_hash(self, path: str) -> str:
        if path not in self._files:
            with open(path, "rb") as file:
                self._files[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._files[path]


def _text(reply: Any) -> str:
    """Newer classes answer with a text and its token counts."""
    return str(getattr(reply, "text", reply))


def _refuse_failures(model: str, replies: Sequence[str]) -> None:
    failed = [reply for reply in replies if reply.startswith(_FAILED)]
    if failed:
        raise UserError(f"{model} failed on {len(failed)} of {len(replies)} requests: {failed[0][:300]}")
    if len(replies) > 1 and not any(reply.strip() for reply in replies):
        raise UserError(
            f"{model} gave {len(replies)} empty answers in a row: lmms-eval's classes turn errors into empty "
            "answers, its log lines above say which."
        )


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
