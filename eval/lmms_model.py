"""lmms-eval's model `regiontower`: any checkpoint that `mllm.plain_llava.load_llava` opens, asked in batches that share
each picture's prefix, with a response log.

    python -m lmms_eval --model regiontower --model_args pretrained=DIR \\
        --include_path "$(regiontower lmms-tasks)" --tasks regiontower_grounding
    torchrun --nproc_per_node 8 -m lmms_eval --model regiontower ...
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..mllm import Answer, Question, SharedAnswers
from ..mllm.batched_plan import plan_batches
from ..mllm.plain_llava import load_llava
from ..vision_towers.errors import UserError
from .fingerprint import checkpoint_id, weights_hash
from .lmms_requests import Asked, Pictures, Turn, cut_at, generation_of, one_turn, whole_number
from .response_log import ResponseLog, answer_key
from .scoring import restate_boxes
from .task_rows import is_grounding_row, is_task_row

ARGUMENTS = ("pretrained", "device", "dtype", "quant", "batch_size", "max_new_tokens", "resume", "box_format")
PLAIN_BOX_FORMAT = "norm01"  # LLaVA-1.5's

Answerer = Callable[..., list[Answer]]


class RegionTowerChat(lmms):
    """lmms-eval's chat class (one user turn, one image, greedy answers).

    A question of our own tasks takes its prompt boxes from the row; other tasks come without boxes. Answers to
    grounding rows are restated in `scoring.ANSWER_FORMAT` when the checkpoint speaks another convention.

    Args (`--model_args`; lmms-eval may hand each over as str, int, float or bool):
        pretrained: folder or hub id of the checkpoint.
        device, dtype, quant: as `mllm.load_mllm` takes them.
        batch_size: questions a batch, a whole number (not "auto").
        max_new_tokens: overrides what the tasks say.
        resume: path of a response log (JSONL); what it holds is not asked again.
        box_format: the convention of a plain LLaVA's boxes (norm01 when absent); other checkpoints bring their own.

    Raises:
        UserError: an unknown argument, a value of the wrong kind, or what `load_llava` refuses.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: Any = None,
        device: Any = "auto",
        dtype: Any = "auto",
        quant: Any = "none",
        batch_size: Any = 16,
        max_new_tokens: Any = None,
        resume: Any = None,
        box_format: Any = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise UserError(
                f"regiontower does not know the model argument {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(ARGUMENTS[:-1])} and {ARGUMENTS[-1]}"
            )
        if pretrained is None:
            raise UserError("regiontower needs the model argument pretrained=DIR, the folder or hub id of a checkpoint")
        batch_size = whole_number("batch_size", batch_size)
        max_new_tokens = None if max_new_tokens is None else whole_number("max_new_tokens", max_new_tokens)
        accelerator = process_group()
        if accelerator is not None and str(device) == "auto":
            device = accelerator.device
        model, processor = load_llava(str(pretrained), device=str(device), dtype=str(dtype), quant=str(quant))
        self._set_up(model, processor, None, batch_size, max_new_tokens, resume, box_format, accelerator, progress=True)

    @classmethod
    def from_module(
        cls,
        model: torch.nn.Module,
        processor: Any,
        *,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        resume: str | Path | None = None,
        box_format: str | None = None,
        progress: bool = True,
        answer: Answerer | None = None,
    ) -> "RegionTowerChat":
        """The same around a model that is in memory already, for instance the one being trained.

        answer: called as `answer(model, processor, questions, max_new_tokens=, batch_size=)` for each batch; the seam
            for a model of another kind. Our own batches when absent.
        """
        self = cls.__new__(cls)
        self._set_up(
            model, processor, answer, batch_size, max_new_tokens, resume, box_format, process_group(), progress
        )
        return self

    def _set_up(
        self, model, processor, answer, batch_size, max_new_tokens, resume, box_format, accelerator, progress
    ) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.box_format = _convention(processor, box_format)
        self._answer, self._progress = answer, progress
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.weights_hash = weights_hash(model)
        self._checkpoint = checkpoint_id(self.weights_hash, model, processor)
        self.log = None if resume is None else ResponseLog(str(resume), self._rank)
        self._pictures = Pictures()
        # (task, doc_id) -> the score of each box of that row's answer, None where it has none; of the last call.
        self.box_scores: dict[tuple[str, int], list[float] | None] = {}
        # (task, doc_id) -> hash of the picture that was shown.
        self.shown: dict[tuple[str, int], str] = {}

    def clean(self) -> None:
        """Nothing: lmms-eval calls this after generation, and its own version deletes every module of the instance."""

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests."""
        answer = self._answer or self._shared_answers()
        wanted = self._read_all(requests, self._read)
        replies = self._replies(wanted, lambda batch: self._ask(batch, answer), "answers")
        self.box_scores |= {(asked.task, asked.doc_id): replies[asked.key].get("scores") for asked in wanted}
        self.shown |= {(asked.task, asked.doc_id): asked.picture for asked in wanted}
        return [cut_at(replies[asked.key]["reply"], asked.until) for asked in wanted]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported."""
        raise UserError("regiontower answers one question an image; tasks of several rounds are not supported")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        """Not of the chat class."""
        raise UserError(
            "tasks that compare likelihoods need --force_simple (lmms-eval asks chat models for text alone)"
        )

    def _shared_answers(self) -> Answerer:
        shared = SharedAnswers(self.model, self.processor, box_format=self.box_format)

        def answer(model, processor, questions, *, max_new_tokens: int, batch_size: int) -> list[Answer]:
            return shared.answer(questions, max_new_tokens)

        return answer

    def _turn_of(self, request: Instance) -> tuple[str, Mapping, Mapping, Turn, int, str]:
        """Context, generation arguments, document, turn, doc_id and task of a request."""
        context, doc_to_messages, generation, doc_id, task, split = tuple[Any, ...](request.args)

        def turn():
            # The document is fetched anew: held, it would keep its decoded picture.
            return one_turn(doc_to_messages(self.task_dict[task][split][doc_id]), task)

        return context, generation, self.task_dict[task][split][doc_id], turn, doc_id, task

    def _read(self, request: Instance) -> Asked:
        context, generation, doc, turn, doc_id, task = self._turn_of(request)
        boxes = [list(map(float, box)) for box in doc["prompt_boxes"]] if is_task_row(doc) else []
        image, text = turn()
        picture = self._pictures.put(image)
        max_new_tokens, until = generation_of(generation, task, self.max_new_tokens)
        key = answer_key(
            task, doc_id, context, text, boxes, picture, generation, max_new_tokens, self.box_format, self._checkpoint
        )
        return Asked(
            key, picture, text, boxes, turn, task, doc_id, max_new_tokens, until, grounding=is_grounding_row(doc)
        )

    def _read_all(self, requests: Sequence[Instance], read: Callable[[Instance], Asked]) -> list[Asked]:
        """Every request, its picture decoded once for its key; several at a time, for decoding takes one core each."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(self._bar(pool.map(read, requests), len(requests), "reading"))

    def _replies(
        self, wanted: Sequence[Asked], ask: Callable[[Sequence[Asked]], dict[str, dict]], what: str
    ) -> dict[str, dict]:
        """The reply to every key; what the log does not hold is asked, and logged batch by batch."""
        replies: dict[str, dict] = {} if self.log is None else self.log.answers
        # lmms-eval repeats a request to even out the ranks; each key is asked once.
        missing = list({asked.key: asked for asked in wanted if asked.key not in replies}.values())
        with tqdm(total=len(missing), desc=what, disable=self._silent) as bar:
            for batch in _batches(missing, self.batch_size):
                new = ask(batch)
                if self.log is None:
                    replies.update(new)
                else:
                    self.log.add(new)
                bar.update(len(batch))
        return replies

    def _ask(self, batch: Sequence[Asked], answer: Answerer) -> dict[str, dict]:
        questions = self._questions(batch)
        answers = answer(
            self.model,
            self.processor,
            questions,
            max_new_tokens=batch[0].max_new_tokens,
            batch_size=self.batch_size,
        )
        if len(answers) != len(batch):
            raise RuntimeError(f"{len(batch)} questions got {len(answers)} answers")
        return {
            asked.key: {
                "task": asked.task,
                "doc_id": asked.doc_id,
                "answer": answer.text,
                "reply": self._reply(asked, answer, question.image.size),
                "scores": None if answer.boxes is None else answer.boxes.scores,
            }
            for asked, answer, question in zip(batch, answers, questions, strict=True)
        }

    def _questions(self, batch: Sequence[Asked]) -> list[Question]:
        images = {}
        for asked in batch:
            if asked.picture not in images:
                images[asked.picture] = self._pictures.get(asked)
        return [Question(images[asked.picture], asked.text, asked.boxes) for asked in batch]

    def _reply(self, asked: Asked, answer: Answer, size: tuple[int, int]) -> str:
        if not asked.grounding:
            return answer.text
        return restate_boxes(answer.text, answer.boxes, self.box_format, size)

    @property
    def _silent(self) -> bool:
        return self._rank != 0 or not self._progress

    def _bar(self, items: Iterator, total: int, what: str) -> Iterator:
        return tqdm(items, total=total, desc=what, disable=self._silent)  # pyright: ignore[reportReturnType]


def process_group() -> Any:
    """accelerate's process group when several processes were started (torchrun, accelerate launch), else None.

    Raises:
        UserError: accelerate was set up before, for one process.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted < 2:
        return None
    from accelerate import Accelerator, PartialState

    # Without a GPU accelerate wants to be told, or it takes each process for the only one.
    ready = bool(PartialState._shared_state)
    group = Accelerator() if ready else Accelerator(cpu=not torch.cuda.is_available())
    if group.num_processes != wanted:
        raise UserError(
            f"{wanted} processes were started and accelerate knows of {group.num_processes}; without a GPU set "
            "ACCELERATE_USE_CPU=true before torchrun -m lmms_eval"
        )
    return group


def _convention(processor: Any, asked: Any) -> str:
    """The box convention that the answers are read in: the checkpoint's own, or for one without (a plain LLaVA) the
    asked one."""
    own = getattr(processor, "box_format", None)
    if own is not None and asked is not None and str(asked) != own:
        raise UserError(f"the checkpoint speaks {own}; box_format={asked} is for plain LLaVAs, which declare none")
    return own or str(asked or PLAIN_BOX_FORMAT)


def _batches(requests: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Batches of one generation length; those about one picture side by side, long questions first."""
    for tokens in dict.fromkeys(asked.max_new_tokens for asked in requests):
        alike = [asked for asked in requests if asked.max_new_tokens == tokens]
        pictures, lengths = [asked.picture for asked in alike], [len(asked.text) for asked in alike]
        for batch in plan_batches(pictures, lengths, size):
            yield [alike[position] for position in batch]
