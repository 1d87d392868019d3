"""The quickstart in an empty folder, with everything its figures rest on.

regiontower bench quickstart --out DIR [--minutes 4] --json
"""

import argparse
import json
from pathlib import Path

from regiontower.benchmarks._stamp import stamp
from regiontower.quickstart import RUN_NAMES, quickstart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, both stages together")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    headline = quickstart(arguments.out, minutes=arguments.minutes)
    tasks = {
        name: json.loads((arguments.out / "eval" / name / "results.json").read_text(encoding="utf-8"))["tasks"]
        for name in headline
        if name != "seconds"
    }
    results = {
        "command": f"regiontower bench quickstart --out DIR --minutes {arguments.minutes:g} --json",
        **headline,
        "tasks": tasks,
        **stamp({stage: arguments.out / "runs" / name for stage, name in RUN_NAMES.items()}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
