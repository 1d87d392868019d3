"""What a check has found: how bad, what, why it matters and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """level: "error" (it cannot be right) or "warning" (it may be meant). what: is the case. why: that matters. mend:
    what to do."""

    level: Literal["error", "warning"]
    what: str
    why: str
    mend: str

    def line(self) -> str:
        """In one line."""
        return f"{self.level}: {self.what}; {self.why}; {self.mend}"


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """In the order of their level, and else as they come."""
    return sorted(findings, key=lambda finding: finding.level != "error")


def count(findings: Iterable[Finding], level: Literal["error", "warning"]) -> int:
    """How many are of this level."""
    return sum(finding.level == level for finding in findings)


def report(findings: list[Finding]) -> dict[str, Any]:
    """For `--json`."""
    return {
        "errors": count(findings, "error"),
        "warnings": count(findings, "warning"),
        "findings": [asdict(finding) for finding in findings],
    }
