"""Texts of classes: names, or means over prompt templates (Radford et al., arXiv 2103.00020, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ...vision_towers import UserError
from .text_side import unit

PLACE = "{}"
# A short list of ours. The papers' own 80 templates are given as a file.
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture with a {} in it.",
    "a part of a photo that shows a {}.",
    "this is a {}.",
    "a close view of a {}.",
    "a {} far away.",
)


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Templates of a UTF-8 text file, one a line, each with one `{}` for the name; blank lines are passed over.

    Raises:
        UserError: a file that cannot be read, holds none, or has a line without one `{}`.
    """
    found = _lines(path, "template", f"a photo of a {PLACE}.")
    for number, line in found:
        if line.count(PLACE) != 1:
            raise UserError(f"{path}, line {number}: {line!r} must hold {PLACE} once, where the name goes.")
    return tuple(line for _, line in found)


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Names of classes of a UTF-8 text file, one a line, in its order; blank lines are passed over.

    Raises:
        UserError: a file that cannot be read, holds none, or has a name twice.
    """
    first: dict[str, int] = {}
    for number, line in _lines(path, "class", "traffic light"):
        if line in first:  # it would be a tie with itself, which counts as wrong
            raise UserError(f"{path}, line {number}: {line!r} stands in line {first[line]} already; name a class once.")
        first[line] = number
    return tuple(first)


def _lines(path: str | Path, what: str, example: str) -> list[tuple[int, str]]:
    """Numbers and texts of the lines that are not blank."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a text file with one {what} a line.") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"{path}: there is no {what} in it; give one a line, such as '{example}'.")
    return found


def class_texts(texts: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """`(C, J)` of length 1, on the CPU: w_c = n(sum_t n(text(t(c)))), with n(x) = x / |x|.

    texts: `(n, J)` of n texts, of any length.
    """
    filled = [template.replace(PLACE, name) for name in names for template in templates]
    each = unit(texts(filled)).unflatten(0, (len(names), len(templates)))
    return unit(each.mean(dim=1))


def name_texts(
    texts: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str] | None
) -> Tensor:
    """`(C, J)` of length 1, on the CPU: the names alone, or with `templates` as `class_texts`."""
    return unit(texts(names)) if templates is None else class_texts(texts, names, templates)
