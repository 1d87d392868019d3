"""LLaVA conversations, a JSON list or JSONL of

    {"id": "1", "image": "images/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nDescribe the image."}, {"from": "gpt", "value": "A cup."}]}

read in two ways: `read_llava_conversations` keeps every turn (what the instruct stage trains on directly), and the
importer `llava` makes region records of images with captions, from the answers to prompts that ask for a description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bad_records import BadRecord, name_bad, refuse_unusable, refuse_without_folder
from ..images import ImageError, image_size, open_image
from ..phrases import normalise_phrase
from ..records import Record
from .description_prompts import DESCRIPTION_PROMPTS
from .fields import NothingToImport, distinct, json_list_or_lines, need, one_sentence

_IMAGE_MARK = "<image>"  # of the file format, whatever a model's own image token is
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class LlavaSample:
    """One conversation. `turns` = (role, text) with roles "system" (first only, may be absent), then "user" and
    "assistant" in turn, ending with "assistant": an answer before the first question of the file, and a question after
    the last answer, are not among them. With an image the first user turn holds `<image>` exactly once, and no other
    turn does; without one (`image` None) none does. `label` names the sample in its file."""

    image: Path | None
    turns: list[tuple[str, str]]
    label: str = ""


@dataclass(frozen=True)
class LlavaSet:
    """The good samples of a file; iterates, counts and indexes like the list of them."""

    path: Path
    samples: list[LlavaSample]
    bad: list[BadRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[LlavaSample]:
        return iter(self.samples)

    def __getitem__(self, index: int) -> LlavaSample:
        return self.samples[index]

    def summary(self) -> str:
        """One line for the run: `665 conversations, 0 bad`, followed by the bad ones by name."""
        text = f"{len(self.samples)} conversations, {len(self.bad)} bad"
        return f"{text}: {name_bad(self.bad)}" if self.bad else text


def read_llava_conversations(
    path: str | Path, image_root: str | Path | None = None, check_images: bool = False
) -> LlavaSet:
    """Read and validate all conversations of a file, text-only ones too.

    Images are relative to `image_root` when given, else to the folder of `path`. `check_images` decodes each image; a
    conversation whose image is missing or damaged is then bad. Raises UserError when the file cannot be read, holds no
    good conversation, or more than max(5, 1 %) are bad.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    if image_root is not None:
        refuse_without_folder(root)
    found: list[LlavaSample] = []
    bad: list[BadRecord] = []
    for label, item in json_list_or_lines(path):
        try:
            if isinstance(item, ValueError):
                raise item
            sample = llava_sample(label, item, root)
            if check_images and sample.image is not None:
                open_image(sample.image)
        except ValueError as error:
            bad.append(BadRecord(label, one_sentence(error)))
        else:
            found.append(sample)
    refuse_unusable(path, bad, good=len(found))
    return LlavaSet(path, found, bad)


def import_llava(path: Path, image_root: Path) -> Iterator[tuple[str, Record | Exception]]:
    """Stream (label, record of an image with captions). The size comes from the image's header, so the images must be
    there. A caption is an answer to one of LLaVA's own description prompts, or to `<image>` alone; a conversation
    without such an answer, or without an image, is `NothingToImport`.
    """
    for label, item in json_list_or_lines(path):
        try:
            if isinstance(item, ValueError):
                raise item
            sample = llava_sample(label, item, image_root)
            if sample.image is None:
                raise NothingToImport("no image")
            captions = _captions(sample)
            if not captions:
                raise NothingToImport("no answer to a description prompt")
            width, height = _size(sample.image, image_root)
            record = Record(image=item["image"], width=width, height=height, captions=captions)
        except (ValueError, NothingToImport) as error:
            yield label, error
        else:
            yield label, record


def llava_sample(label: str, item: Mapping[str, Any], root: Path) -> LlavaSample:
    """One object of a file as a conversation; `root` is the folder of its image. Raises ValueError for a bad one."""
    name = None if item.get("image") is None else need(item, "image", str)
    turns = [_turn(index, turn) for index, turn in enumerate(need(item, "conversations", list))]
    system = turns[:1] if turns and turns[0][0] == "system" else []
    talk = _answered(turns, len(system))
    turns = [*system, *talk]
    marks = [text.count(_IMAGE_MARK) for _, text in turns]
    expected = [int(name is not None and turn is talk[0]) for turn in turns]
    if marks != expected:
        rule = (
            "must hold <image> once, in the first human turn" if name else "has no image, so it must not hold <image>"
        )
        raise ValueError(f"the conversation {rule}; it holds it {sum(marks)} times")
    return LlavaSample(None if name is None else root / name, turns, label)


def _answered(turns: list[tuple[str, str]], first: int) -> list[tuple[str, str]]:
    """Questions and answers from turn `first` on. An answer before the first question is left out, as LLaVA's own
    preprocessing does it, and so is a question at the end, from which nothing can be learned."""
    if len(turns) > first and turns[first][0] == "assistant":
        first += 1
    talk = turns[first:]
    for index, (role, _) in enumerate(talk):
        if role != ("user", "assistant")[index % 2]:
            raise ValueError(f"turn {first + index} is from {role!r}; turns must alternate between 'human' and 'gpt'")
    talk = talk[: len(talk) // 2 * 2]
    if not talk:
        raise ValueError(f"a conversation needs a question and an answer; there is none in its {len(turns)} turns")
    return talk


def _turn(index: int, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {index} is not an object")
    role, text = need(turn, "from", str), need(turn, "value", str)
    if role not in _ROLES:
        raise ValueError(f"turn {index} is from {role!r}, not 'human' or 'gpt'")
    if not text.strip():
        raise ValueError(f"turn {index} is blank")
    return _ROLES[role], text


def _captions(sample: LlavaSample) -> list[str]:
    talk = [text for role, text in sample.turns if role != "system"]
    return distinct(
        [answer for question, answer in zip(talk[::2], talk[1::2], strict=True) if _asks_for_description(question)]
    )


def _asks_for_description(question: str) -> bool:
    return normalise_phrase(question.replace(_IMAGE_MARK, " ").replace("’", "'")).rstrip(".?! ") in DESCRIPTION_PROMPTS


def _size(image: Path, root: Path) -> tuple[int, int]:
    if not image.is_file():
        raise ImageError(f"there is no image {image}; image_root is {root}.")
    return image_size(image)
