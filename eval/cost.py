"""What an answer costs: tokens, seconds at batch size 1, memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..mllm import Question, SharedAnswers
from ..train_stages.images import open_image
from .opened import OpenedModel
from .task_rows import TaskRow, even_sample

QUESTIONS = 16
MAX_NEW_TOKENS = 64
_MEGABYTE = 1024 * 1024


def measure_cost(opened: OpenedModel, rows: Sequence[TaskRow], count: int = QUESTIONS) -> dict[str, float | None]:
    """Ask `count` of the rows one by one, each as the first question about its picture, after one for warming up.

    Returns:
        - `parameters_m`, `vision_parameters_m`: millions. `weights_mb`: as they are held, megabytes (2^20 bytes).
        - `image_tokens`: a picture, mean. `answer_tokens`: an answer, mean.
        - `first_token_s`, `answer_s`: median seconds from picture and question to the first token and to the end of the
          answer. They compare models that were measured on the same machine while nothing else ran.
        - `peak_mb`: on CUDA the peak of what torch held while answering; else the process's largest resident memory
          meanwhile (Linux), which holds Python and its libraries too; None where nobody can say.

        A model without weights here (an endpoint) has None throughout.
    """
    module = opened.module
    names = ("parameters_m", "vision_parameters_m", "weights_mb", "image_tokens", "answer_tokens")
    if module is None or opened.convention is not None:
        return dict.fromkeys((*names, "first_token_s", "answer_s", "peak_mb"))
    chosen = even_sample(rows, count + 1)
    questions = [Question(open_image(row.image), row.question, row.prompt_boxes) for row in chosen]
    processor = opened.chat.processor
    was_training = module.training
    module.eval()
    _reset_peak(opened.chat.device)
    try:
        first, whole, lengths = [], [], []
        for position, question in enumerate(questions):
            first_token, _ = _timed(opened, question, 1)
            seconds, text = _timed(opened, question, MAX_NEW_TOKENS)
            if position or len(questions) == 1:
                first.append(first_token)
                whole.append(seconds)
                lengths.append(len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]))
    finally:
        module.train(was_training)
    return {
        "parameters_m": _millions(module),
        "vision_parameters_m": _millions(_tower(module)),
        "weights_mb": sum(tensor.numel() * tensor.element_size() for tensor in module.parameters()) / _MEGABYTE,
        "image_tokens": statistics.mean(_image_tokens(processor, question) for question in questions),
        "answer_tokens": statistics.mean(lengths),
        "first_token_s": statistics.median(first),
        "answer_s": statistics.median(whole),
        "peak_mb": _peak(opened.chat.device),
    }


def _timed(opened: OpenedModel, question: Question, tokens: int) -> tuple[float, str]:
    """Seconds and text of one answer; a fresh `SharedAnswers`, so that nothing of the picture is kept."""
    asked = SharedAnswers(opened.chat.model, opened.chat.processor, box_format=opened.chat.box_format)
    _wait(opened.chat.device)
    started = time.perf_counter()
    (answer,) = asked.answer([question], tokens)
    _wait(opened.chat.device)
    return time.perf_counter() - started, answer.text


def _image_tokens(processor: Any, question: Question) -> int:
    if hasattr(processor, "image_tokens"):
        return processor.image_tokens(processor.frame(question.image.size))
    text = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
    ids = processor(images=question.image, text=text, return_tensors="pt")["input_ids"]
    return int((ids == processor.image_token_id).sum())


def _tower(module: torch.nn.Module) -> torch.nn.Module | None:
    return next((part for name, part in module.named_modules() if name.endswith("vision_tower")), None)


def _millions(module: torch.nn.Module | None) -> float | None:
    return None if module is None else sum(tensor.numel() for tensor in module.parameters()) / 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to what is resident now


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MEGABYTE
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return None
