"""Whether two builds of the packaged models give the same weights to the bit: every stage, a few steps, twice.

regiontower bench nano-rebuild --out DIR [--steps 50] [--batch-size 8] --json
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

from regiontower.benchmarks._stamp import stamp
from regiontower.benchmarks.nano_build import THREADS, Build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--steps", type=int, default=50, help="of every stage")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--scenes", type=int, default=200, help="training scenes")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    hashes = [build_and_hash(arguments.out / name, arguments) for name in ("first", "second")]
    options = f"--steps {arguments.steps} --batch-size {arguments.batch_size} --scenes {arguments.scenes}"
    results = {
        "command": f"regiontower bench nano-rebuild --out DIR {options} --threads {arguments.threads} --json",
        "bit_equal": hashes[0] == hashes[1],
        "sha256": dict(zip(("first", "second"), hashes, strict=True)),
        **stamp({run.name: run for run in sorted((arguments.out / "first" / "nano" / "runs").iterdir())}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def build_and_hash(folder: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Path -> SHA-256 of every weights file of a build."""
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)  # a run's files name their parents by path; these paths are the same in both builds
    try:
        out = Path("nano")
        Build(out, arguments.steps, arguments.scenes, arguments.threads, arguments.batch_size).run()
        files = sorted((out / "weights").rglob("*.safetensors"))
        return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
