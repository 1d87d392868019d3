"""The same model as lmms-eval's simple class: what `--force_simple` takes, and tasks that compare likelihoods need."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance

from ..mllm import SharedAnswers
from .lmms_model import RegionTowerChat
from .lmms_requests import Asked, Turn, one_visual
from .response_log import answer_key


class RegionTowerSimple(RegionTowerChat):
    """One image and one text a question; answers are written (`generate_until`) or chosen among (`loglikelihood`).

    Args, errors: as the chat class's.
    """

    is_simple = True

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        """(mean negative log-likelihood of the answer's tokens, whether each is the model's own first choice).

        Lower is likelier: lmms-eval's multiple choice takes the smallest, as its own classes return losses, too. The
        tokens are those that the chat template writes for the answer, its end mark included. Each pair comes as the
        `text` of a `GenerationResult`: lmms-eval 0.7.3 turns a bare one into a string and then fails on it.
        """
        shared = SharedAnswers(self.model, self.processor, box_format=self.box_format)
        wanted = self._read_all(requests, self._read_choice)

        def ask(batch: Sequence[Asked]) -> dict[str, dict]:
            found = shared.score(self._questions(batch), [asked.answer or "" for asked in batch])
            return {
                asked.key: {"task": asked.task, "doc_id": asked.doc_id, "loss": one.loss, "greedy": one.greedy}
                for asked, one in zip(batch, found, strict=True)
            }

        replies = self._replies(wanted, ask, "choices")
        pairs: list[Any] = [(replies[asked.key]["loss"], replies[asked.key]["greedy"]) for asked in wanted]
        return [GenerationResult(text=pair) for pair in pairs]

    def _turn_of(self, request: Instance) -> tuple[str, Mapping, Mapping, Turn, int, str]:
        context, generation, doc_to_visual, doc_id, task, split = tuple[Any, ...](request.args)
        turn = self._turn(context, doc_to_visual, doc_id, task, split)
        return context, generation, self.task_dict[task][split][doc_id], turn, doc_id, task

    def _turn(self, context: str, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Turn:
        def turn():
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if callable(doc_to_visual) else None
            return one_visual(visuals, task), context

        return turn

    def _read_choice(self, request: Instance) -> Asked:
        context, target, doc_to_visual, doc_id, task, split = tuple[Any, ...](request.args)
        # lmms-eval puts a space before it, to go behind a plain text; here the chat template says what stands between.
        answer = str(target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])).strip()
        turn = self._turn(context, doc_to_visual, doc_id, task, split)
        picture = self._pictures.put(turn()[0])
        key = answer_key("loglikelihood", task, doc_id, context, answer, picture, self._checkpoint)
        return Asked(key, picture, context, [], turn, task, doc_id, answer=answer)
