"""README.md -> one bash script that runs its `bash` and `python` blocks in order. `console` blocks are left out."""

import argparse
import re
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--quickstart-minutes", type=float, required=True)
    arguments = parser.parse_args()
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", arguments.readme.read_text(), flags=re.M | re.S)
    for number, (language, code) in enumerate(blocks, start=1):
        quick = re.sub(r"(regiontower quickstart\b)", rf"\1 --minutes {arguments.quickstart_minutes:g}", code)
        print(f"printf '\\n---- README block {number} (%s)\\n' \"$(date +%H:%M:%S)\"")
        print(quick if language == "bash" else f"python - <<'PYTHON_BLOCK'\n{quick}PYTHON_BLOCK\n")


if __name__ == "__main__":
    main()
