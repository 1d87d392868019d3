"""What is measured: each file here is a script that prints its result as JSON on the last line.

Run one by `regiontower bench NAME`; committed results lie in `benchmarks/results/`.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ..vision_towers.errors import UserError

FOLDER = Path(__file__).parent


def benchmark_names() -> list[str]:
    """Every benchmark, by file name."""
    return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("[!_]*.py"))


def run_benchmark(name: str, arguments: Sequence[str]) -> None:
    """Run `benchmarks/NAME.py` as a script with `arguments`."""
    if name.replace("_", "-") not in benchmark_names():
        raise UserError(f"there is no benchmark {name!r}; choose among {', '.join(benchmark_names())}.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.argv = [f"regiontower bench {name}", *arguments]
    runpy.run_module(f"{__package__}.{name.replace('-', '_')}", run_name="__main__")
