"""lmms-eval's model `regiontower`: any checkpoint that `mllm.load_mllm` opens, asked in batches, with a response log.

    python -m lmms_eval --model regiontower --model_args pretrained=DIR \\
        --include_path "$(regiontower lmms-tasks)" --tasks regiontower_grounding
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ..mllm import Answer, Question, answer_questions, load_mllm
from ..vision_towers.errors import UserError
from .fingerprint import checkpoint_id, weights_hash
from .response_log import ResponseLog, answer_key
from .scoring import restate_boxes
from .task_rows import is_grounding_row, is_task_row

DEFAULT_NEW_TOKENS = 48
# What a task may say about generation: answers are greedy, so the rest of these must not ask for anything else.
_GREEDY = {"do_sample": (False, None), "num_beams": (1, None), "n": (1, None)}

Answerer = Callable[..., list[Answer]]


@dataclass(frozen=True)
class _Request:
    """One request of lmms-eval: the key of its answer, and where to get its picture again."""

    key: str
    image_hash: str
    text: str
    boxes: list[list[float]]
    messages: Callable[[], list[dict]]
    max_new_tokens: int
    until: tuple[str, ...]
    grounding: bool
    task: str
    doc_id: int


class RegionTowerChat(lmms):
    """lmms-eval's chat class (one user turn, one image, greedy answers).

    A question of our own tasks takes its prompt boxes from the row; other tasks come without boxes. Answers to
    grounding rows are restated in `scoring.ANSWER_FORMAT` when the checkpoint speaks another convention.

    Args (`--model_args`; lmms-eval may hand each over as str, int, float or bool):
        pretrained: folder or hub id of the checkpoint.
        device, dtype: as `mllm.load_mllm` takes them.
        batch_size: questions a batch, a whole number (not "auto").
        max_new_tokens: overrides what the tasks say.
        resume: path of a response log (JSONL); what it holds is not asked again.

    Raises:
        UserError: an unknown argument, a value of the wrong kind, or what `mllm.load_mllm` refuses.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: Any = None,
        device: Any = "auto",
        dtype: Any = "auto",
        batch_size: Any = 16,
        max_new_tokens: Any = None,
        resume: Any = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise UserError(
                f"regiontower does not know the model argument {', '.join(sorted(unknown))}; it takes pretrained, "
                "device, dtype, batch_size, max_new_tokens and resume"
            )
        if pretrained is None:
            raise UserError("regiontower needs the model argument pretrained=DIR, the folder or hub id of a checkpoint")
        batch_size = _whole_number("batch_size", batch_size)
        max_new_tokens = None if max_new_tokens is None else _whole_number("max_new_tokens", max_new_tokens)
        accelerator = _accelerator()
        if accelerator is not None and str(device) == "auto":
            device = accelerator.device
        model, processor = load_mllm(str(pretrained), device=str(device), dtype=str(dtype))
        self._set_up(model, processor, answer_questions, batch_size, max_new_tokens, resume, accelerator, progress=True)

    @classmethod
    def from_module(
        cls,
        model: torch.nn.Module,
        processor: Any,
        *,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        resume: str | Path | None = None,
        progress: bool = True,
        answer: Answerer = answer_questions,
    ) -> "RegionTowerChat":
        """The same around a model that is in memory already, for instance the one being trained.

        answer: called as `answer(model, processor, questions, max_new_tokens=, batch_size=)`, as
        `mllm.answer_questions` is; the seam for a model of another kind.
        """
        self = cls.__new__(cls)
        self._set_up(model, processor, answer, batch_size, max_new_tokens, resume, _accelerator(), progress)
        return self

    def _set_up(self, model, processor, answer, batch_size, max_new_tokens, resume, accelerator, progress) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self._answer, self._progress = answer, progress
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.weights_hash = weights_hash(model)
        self._checkpoint = checkpoint_id(self.weights_hash, model, processor)
        self.log = None if resume is None else ResponseLog(str(resume), self._rank)

    def clean(self) -> None:
        """Nothing: lmms-eval calls this after generation, and its own version deletes every module of the instance."""

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests."""
        wanted = [self._read(request) for request in requests]
        replies: dict[str, dict] = {} if self.log is None else self.log.answers
        # lmms-eval repeats a request to even out the ranks; each key is asked once.
        missing = list({request.key: request for request in wanted if request.key not in replies}.values())
        bar = tqdm(total=len(missing), desc="answers", disable=self._rank != 0 or not self._progress)
        with bar:
            for batch in _batches(missing, self.batch_size):
                new = self._ask(batch)
                if self.log is None:
                    replies.update(new)
                else:
                    self.log.add(new)
                bar.update(len(batch))
        return [_cut(replies[request.key]["reply"], request.until) for request in wanted]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported."""
        raise UserError("regiontower answers one question an image; tasks of several rounds are not supported")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported."""
        raise UserError("regiontower generates answers; tasks that compare likelihoods are not supported")

    def _read(self, request: Instance) -> _Request:
        context, doc_to_messages, generation, doc_id, task, split = tuple[Any, ...](request.args)
        doc: Mapping = self.task_dict[task][split][doc_id]
        boxes = [list(map(float, box)) for box in doc["prompt_boxes"]] if is_task_row(doc) else []

        def messages() -> list[dict]:
            return doc_to_messages(doc)

        image, text = _one_turn(messages(), task)
        image_hash = _image_hash(image)
        max_new_tokens, until = self._generation(generation, task)
        key = answer_key(task, doc_id, context, text, boxes, image_hash, generation, max_new_tokens, self._checkpoint)
        return _Request(
            key, image_hash, text, boxes, messages, max_new_tokens, until, is_grounding_row(doc), task, doc_id
        )

    def _generation(self, generation: Mapping, task: str) -> tuple[int, tuple[str, ...]]:
        for name, allowed in _GREEDY.items():
            if generation.get(name) not in allowed:
                raise UserError(f"task {task} asks for {name}={generation[name]}, but regiontower's answers are greedy")
        until = generation.get("until") or ()
        tokens = self.max_new_tokens or _whole_number(
            "max_new_tokens", generation.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        )
        return tokens, (until,) if isinstance(until, str) else tuple(until)

    def _ask(self, batch: Sequence[_Request]) -> dict[str, dict]:
        images: dict[str, Image.Image] = {}
        for request in batch:
            if request.image_hash not in images:
                images[request.image_hash] = _one_turn(request.messages(), request.task)[0]
        questions = [Question(images[request.image_hash], request.text, request.boxes) for request in batch]
        answers = self._answer(
            self.model,
            self.processor,
            questions,
            max_new_tokens=batch[0].max_new_tokens,
            batch_size=self.batch_size,
        )
        if len(answers) != len(batch):
            raise RuntimeError(f"{len(batch)} questions got {len(answers)} answers")
        return {
            request.key: {
                "task": request.task,
                "doc_id": request.doc_id,
                "answer": answer.text,
                "reply": self._reply(request, answer, images[request.image_hash].size),
            }
            for request, answer in zip(batch, answers, strict=True)
        }

    def _reply(self, request: _Request, answer: Answer, size: tuple[int, int]) -> str:
        if not request.grounding:
            return answer.text
        return restate_boxes(answer.text, answer.boxes, self.processor.box_format, size)


def _accelerator() -> Any:
    """accelerate's process group when several processes were started (torchrun, accelerate launch), else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator()


def _whole_number(name: str, value: Any) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{name} is {value!r}; give a whole number of at least 1")
    return number


def _one_turn(messages: Sequence[Mapping], task: str) -> tuple[Image.Image, str]:
    """Picture and text of one user turn."""
    parts = [part for message in messages for part in message["content"]]
    images = [part["url"] for part in parts if part["type"] == "image"]
    others = {part["type"] for part in parts} - {"image", "text"}
    if len(messages) != 1 or len(images) != 1 or others:
        raise UserError(f"task {task} is not one user turn with one image, which is all that regiontower answers")
    image = images[0]
    if not isinstance(image, Image.Image):
        from ..train_stages.images import open_image

        image = open_image(image)
    return image.convert("RGB"), "\n".join(part["text"] for part in parts if part["type"] == "text")


def _image_hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _batches(requests: Sequence[_Request], size: int) -> Iterator[list[_Request]]:
    """Batches of one generation length, questions about one image side by side, otherwise in the order of asking."""
    groups: dict[int, dict[str, list[_Request]]] = {}
    for request in requests:
        groups.setdefault(request.max_new_tokens, {}).setdefault(request.image_hash, []).append(request)
    for by_image in groups.values():
        ordered = [request for of_image in by_image.values() for request in of_image]
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
