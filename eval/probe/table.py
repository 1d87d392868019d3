"""Figures in lines, for reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .classify import Share


def rows(found: Mapping[str, Share]) -> dict[str, Any]:
    """For JSON; figures without any row are left out."""
    return {name: value.row() for name, value in found.items() if value.n}


def figure_lines(sections: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each figure of `{section: {figure: {"value", "n", "ci95", ...}}}`."""
    lines = []
    for section, figures in sections.items():
        for name, found in figures.items():
            low, high = found["ci95"]
            mean = f", class mean {found['class_mean']:.3f}" if "class_mean" in found else ""
            lines.append(
                f"{section:7s} {name:20s} {found['value']:.3f} [{low:.3f}, {high:.3f}]{mean}  n = {found['n']}"
            )
    return lines
