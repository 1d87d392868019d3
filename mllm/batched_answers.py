"""Many questions at once: the tower and the prompt's beginning run once a picture, the rest in batches."""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from ..vision_towers import UserError
from .answers import Answer, Question, answer_whole
from .batched_cache import KVRows, align_right, can_share
from .batched_plan import plan_batches
from .batched_prefix import Prefix, common_beginning, compute_prefixes, continue_prefixes, cut
from .batched_reader import EncodedPicture, Prompt, Reader, RegionReader
from .cache_argument import cache_argument
from .region_model import RegionModel


@dataclass(frozen=True)
class Likelihood:
    """How a model likes an answer: the mean negative log-likelihood of its tokens, and whether each is the model's own
    first choice."""

    loss: float
    greedy: bool


def answer_questions(
    model: Any, processor: Any, questions: Sequence[Question], *, max_new_tokens: int = 48, batch_size: int = 16
) -> list[Answer]:
    """Answer each question by itself (greedy), `batch_size` at a time; the answers are those of one at a time.

    Raises:
        UserError: a question whose `<region>` placeholders and boxes differ in number, or a box outside its picture.
    """
    shared = SharedAnswers(model, processor)
    answers: dict[int, Answer] = {}
    lengths = [len(question.text) for question in questions]
    # By pixels: callers often open one file for each question about it.
    known = {id(question.image): question.image for question in questions}
    keys = {name: picture_key(picture) for name, picture in known.items()}
    for batch in plan_batches([keys[id(question.image)] for question in questions], lengths, batch_size):
        found = shared.answer([questions[position] for position in batch], max_new_tokens)
        answers |= zip(batch, found, strict=True)
    return [answers[position] for position in range(len(questions))]


class SharedAnswers:
    """Answers batch after batch. Of a batch's last picture the prefix is kept: the next batch may go on with it.

    Args:
        model, processor: from `load_mllm` or `load_llava`.
        box_format: convention of a plain LLaVA's boxes; a RegionLlava's processor has its own.
    """

    def __init__(self, model: Any, processor: Any, *, box_format: str = "norm01"):
        self.model, self.processor = model, processor
        self._reader = _reader(model, processor, box_format)
        self._kept: dict[str, Prefix] = {}

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
        """Greedy answers to one batch of questions, about whichever pictures."""
        if self._reader is None:
            return answer_whole(self.model, self.processor, questions, max_new_tokens)
        prompts, prefixes = self._begin(self._reader, questions, [None] * len(questions))
        order, groups = [], []
        for length, rows in _by_length(prefixes):
            ids = [prompts[row].ids[length:-1] for row in rows]  # the last one is `generate`'s to run
            mine, before = [prompts[row] for row in rows], [prefixes[row] for row in rows]
            _, layers = self._continue(self._reader, mine, before, ids)
            groups.append(KVRows(layers, [length + len(tail) for tail in ids]))
            order += rows
        cache, mask = align_right(groups)
        new_ids, probabilities = self._generate([prompts[row].ids for row in order], cache, mask, max_new_tokens)
        answers = {
            row: self._reader.decode(ids, probs, prompts[row].frame)
            for row, ids, probs in zip(order, new_ids, probabilities, strict=True)
        }
        return [answers[row] for row in range(len(questions))]

    @torch.inference_mode()
    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Likelihood]:
        """How likely each answer is after its question, as the chat template writes it, its end mark included.

        Raises:
            UserError: a kind of model whose prompts cannot be taken apart.
        """
        if self._reader is None:
            kind = type(self.model).__name__
            raise UserError(f"likelihoods of a {kind} are not computed here; choose tasks with written answers.")
        prompts, prefixes = self._begin(self._reader, questions, answers)
        found: dict[int, Likelihood] = {}
        for length, rows in _by_length(prefixes):
            ids = [prompts[row].ids[length:-1] for row in rows]
            mine, before = [prompts[row] for row in rows], [prefixes[row] for row in rows]
            hidden, _ = self._continue(self._reader, mine, before, ids)
            for row, states, tail in zip(rows, hidden, ids, strict=True):
                prompt = prompts[row]
                if len(prompt.ids) == prompt.split:  # an answer without a token
                    found[row] = Likelihood(float("inf"), False)
                    continue
                logits = self.model.lm_head(states[prompt.split - 1 - length : len(tail)]).float()
                target = torch.tensor(prompt.ids[prompt.split :], device=logits.device)
                loss = torch.nn.functional.cross_entropy(logits, target)
                found[row] = Likelihood(float(loss), bool((logits.argmax(-1) == target).all()))
        return [found[row] for row in range(len(questions))]

    def _begin(
        self, reader: Reader, questions: Sequence[Question], answers: Sequence[str | None]
    ) -> tuple[list[Prompt], list[Prefix]]:
        """The prompts, and for each the prefix that it continues."""
        keys, shown = _pictures(reader, questions)
        kept = {key: prefix for key, prefix in self._kept.items() if key in shown}
        new = [key for key in shown if key not in kept]
        pictures: dict[str, EncodedPicture] = {key: prefix.picture for key, prefix in kept.items()}
        pictures |= zip(new, reader.encode([shown[key] for key in new]) if new else [], strict=True)
        prompts = [
            reader.prompt(question, pictures[key], answer)
            for question, key, answer in zip(questions, keys, answers, strict=True)
        ]
        lengths = self._prefix_lengths(reader, keys, prompts, kept)
        first = {key: prompts[keys.index(key)].ids for key in shown}
        beginnings = {key: first[key][: lengths[key]] for key in new}
        prefixes = compute_prefixes(self.model, reader, pictures, beginnings)
        prefixes |= {key: cut(prefix, lengths[key]) for key, prefix in kept.items()}
        self._kept = {keys[-1]: prefixes[keys[-1]]}
        return prompts, [prefixes[key] for key in keys]

    def _prefix_lengths(
        self, reader: Reader, keys: Sequence[str], prompts: Sequence[Prompt], kept: dict[str, Prefix]
    ) -> dict[str, int]:
        """Prefixes of pictures with equally many tokens get one length, so that they run together."""
        lengths, ends = {}, {}
        for key in dict.fromkeys(keys):
            mine = [prompt for prompt, other in zip(prompts, keys, strict=True) if other == key]
            lengths[key] = common_beginning(mine, reader.image_token_id, reader.region_token_id, kept.get(key))
            ends[key] = mine[0].ids.count(reader.image_token_id)
        return {key: min(lengths[other] for other in lengths if ends[other] == ends[key]) for key in lengths}

    def _continue(
        self, reader: Reader, prompts: Sequence[Prompt], prefixes: Sequence[Prefix], ids: Sequence[list[int]]
    ) -> tuple[torch.Tensor, Any]:
        of_picture: dict[int, list[int]] = {}  # its regions are read in one go
        for row, prefix in enumerate(prefixes):
            of_picture.setdefault(id(prefix), []).append(row)
        regions: dict[int, torch.Tensor] = {}
        for rows in of_picture.values():
            boxes = [prompts[row].boxes for row in rows]
            found = reader.regions(prefixes[rows[0]].picture, torch.cat(boxes))
            regions |= zip(rows, found.split([len(one) for one in boxes]), strict=True)
        flat = torch.cat([regions[row] for row in range(len(prompts))])
        return continue_prefixes(self.model, prefixes, ids, flat, reader)

    def _generate(
        self, ids: Sequence[list[int]], cache: Any, mask: torch.Tensor, max_new_tokens: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """New ids of each row, and the probability of each."""
        width = mask.shape[1] + 1
        padded = torch.tensor([[row[-1]] * (width - len(row)) + row for row in ids], device=mask.device)
        recorder = _ChosenProbabilities()
        handle = self.model.lm_head.register_forward_hook(recorder.see)
        try:
            output = self.model.generate(
                input_ids=padded,
                attention_mask=torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1),
                **cache_argument(cache),
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList([recorder]),
                do_sample=False,
                num_beams=1,
                # Only sampling reads these; what a checkpoint says of them would be a warning a batch.
                temperature=None,
                top_p=None,
                top_k=None,
            )
        finally:
            handle.remove()
        new = output[:, width:]
        return new.tolist(), torch.stack(list(recorder.chosen), dim=1)[:, : new.shape[1]].tolist()


class _ChosenProbabilities(StoppingCriteria):
    """Never stops anything; notes each new token's probability before the next step's logits replace these.

    Keeping all logits of a long answer, as `generate` can, takes gigabytes with a large vocabulary.
    """

    def __init__(self) -> None:
        self._logits = torch.empty(0)
        self.chosen: deque[torch.Tensor] = deque()

    def see(self, module: Any, inputs: Any, logits: torch.Tensor) -> None:
        """A forward hook of the head."""
        self._logits = logits[:, -1].float()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        token = input_ids[:, -1:].to(self._logits.device)
        self.chosen.append(self._logits.softmax(-1).gather(-1, token)[:, 0])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _reader(model: Any, processor: Any, box_format: str) -> Reader | None:
    """How this kind of model is read; None for one whose prompts cannot be taken apart."""
    from .plain_llava import PLAIN_LLAVAS, PlainLlavaReader

    if not can_share(model.config.get_text_config()):
        return None
    if isinstance(model.model, RegionModel):
        return RegionReader(model, processor)
    return PlainLlavaReader(model, processor, box_format) if model.config.model_type in PLAIN_LLAVAS else None


def _pictures(reader: Reader, questions: Sequence[Question]) -> tuple[list[str], dict[str, Image.Image]]:
    """For each question the key of what it shows, and those pictures. Equal pixels are one picture."""
    keys, shown, known = [], {}, {}
    for question in questions:
        picture = reader.picture(question)
        if id(picture) not in known:
            known[id(picture)] = (picture_key(picture), picture)  # held: an id is only good while its picture lives
        key = known[id(picture)][0]
        keys.append(key)
        shown.setdefault(key, picture)
    return keys, shown


def picture_key(picture: Image.Image) -> str:
    """SHA-256 of the pixels."""
    return hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()


def _by_length(prefixes: Sequence[Prefix]) -> list[tuple[int, list[int]]]:
    """(prefix length, positions of the prompts that continue such a prefix)."""
    groups: dict[int, list[int]] = {}
    for row, prefix in enumerate(prefixes):
        groups.setdefault(len(prefix.ids), []).append(row)
    return list(groups.items())
