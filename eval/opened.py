"""A model that is ready to be asked through lmms-eval, whatever class it is of, and what results say about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..mllm.plain_llava import load_llava
from .conventions import Convention
from .random_state import keep_random_state
from .scoring import ANSWER_FORMAT

if TYPE_CHECKING:
    from .foreign import ForeignModel
    from .lmms_model import RegionTowerChat

    Model = str | Path | tuple[Any, Any] | RegionTowerChat | ForeignModel


@dataclass(frozen=True)
class Opening:
    """How a model is opened and asked.

    Attributes:
        device, dtype, quant: of a model that is loaded here, as `mllm.plain_llava.load_llava` takes them.
        batch_size: questions a batch (not of a `RegionTowerChat`, which has its own).
        progress: show a bar with the time left on stderr.
    """

    device: str = "auto"
    dtype: str = "auto"
    quant: str = "none"
    batch_size: int = 16
    progress: bool = True


@dataclass(frozen=True)
class OpenedModel:
    """Attributes:
    chat: an `lmms` instance of lmms-eval; it has a response log.
    name: what results call it.
    convention: None for our own class, which restates its answers.
    module: the weights, where the class shows them (an endpoint has none).
    """

    chat: Any
    name: str
    convention: Convention | None
    module: torch.nn.Module | None

    @property
    def weights_sha256(self) -> str | None:
        """`fingerprint.weights_hash`, None without weights."""
        return self.chat.weights_hash

    @property
    def box_format(self) -> dict[str, str | None]:
        """The convention of the model's own answers, and the one that scores read."""
        if self.convention is not None:
            return {"model": self.convention.box_format, "scored": self.convention.box_format}
        return {"model": self.chat.box_format, "scored": ANSWER_FORMAT}

    @property
    def arguments(self) -> dict[str, Any]:
        """Device, batch size and the like, for the results."""
        asked = self.chat if self.convention is None else self.chat.inner
        return {
            "device": str(getattr(asked, "device", None)),
            "batch_size": getattr(asked, "batch_size", None),
            "max_new_tokens": getattr(asked, "max_new_tokens", None),
        }

    def box_scores(self, task: str, doc_id: int) -> list[float] | None:
        """The score of each box of the answer that was given last to this row; None where there are none."""
        return None if self.convention is not None else self.chat.box_scores.get((task, doc_id))


def open_model(model: Model, log: Path, how: Opening) -> OpenedModel:
    """Open a model, or take one that is open. The random state of the process is as before afterwards.

    Args:
        model: folder or hub id of a checkpoint, `(model, processor)` in memory, a ready `RegionTowerChat`, or a
            `foreign.ForeignModel`.
        log: response log, of a model that has none yet.

    Raises:
        UserError: what `mllm.plain_llava.load_llava` or `foreign.open_foreign` refuses.
    """
    with keep_random_state():
        return _open(model, log, how)


def _open(model: Model, log: Path, how: Opening) -> OpenedModel:
    from .foreign import ForeignModel, open_foreign
    from .lmms_model import RegionTowerChat
    from .response_log import ResponseLog

    if isinstance(model, ForeignModel):
        asked = open_foreign(model, log, device=how.device, batch_size=how.batch_size, progress=how.progress)
        return OpenedModel(asked, str(model), model.convention, asked.module)
    if isinstance(model, RegionTowerChat):
        if model.log is None:
            model.log = ResponseLog(log)
        return OpenedModel(model, type(model.model).__name__, None, model.model)
    if isinstance(model, str | Path):
        module, processor = load_llava(model, device=how.device, dtype=how.dtype, quant=how.quant)
        name = str(model)
    else:
        module, processor = model
        name = type(module).__name__
    chat = RegionTowerChat.from_module(module, processor, batch_size=how.batch_size, resume=log, progress=how.progress)
    return OpenedModel(chat, name, None, module)
