"""A user's mistake that shows in a process that loads data, on its way to the training process.

torch hands on an exception of such a process with the whole traceback as its message; as a value it stays one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch.utils.data import get_worker_info

from ...vision_towers.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """What comes in place of a batch that cannot be made. sentence: of the `UserError`."""

    sentence: str


def refused_as_value(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load`, whose `UserError` is given as a `Refusal` in a process of a data loader, and raised elsewhere."""

    @wraps(load)
    def loaded(*arguments: Any) -> Any:
        try:
            return load(*arguments)
        except UserError as error:
            if get_worker_info() is None:
                raise
            return Refusal(str(error))

    return loaded


def raise_refusals(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches.

    Raises:
        UserError: one of them is a `Refusal`.
    """
    for batch in batches:
        if isinstance(batch, Refusal):
            raise UserError(batch.sentence)
        yield batch
