"""What to type for a run is what argparse reads back."""

import argparse
from pathlib import Path

from regiontower.benchmarks._command import typed


def test_it_can_be_typed_again():
    parser = argparse.ArgumentParser()
    parser.add_argument("--boxes", type=int, nargs="+", default=[1])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    words = ["--boxes", "8", "32", "--set", "a=1", "--set", "b=2", "--out", "here", "--json"]
    command = typed("regions", parser, parser.parse_args(words))
    assert command == "regiontower bench regions --boxes 8 32 --set a=1 --set b=2 --out DIR --json"
    again = parser.parse_args(command.split()[3:])
    assert (again.boxes, again.set, again.batch_size, again.json) == ([8, 32], ["a=1", "b=2"], 4, True)
