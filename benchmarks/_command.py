"""What to type for a benchmark's run, for its result."""

import argparse
from pathlib import Path


def typed(name: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """The command with every option that was not left alone. Paths of the machine are nobody's business: `DIR`."""
    words = [f"regiontower bench {name}"]
    for key, value in vars(arguments).items():
        if value == parser.get_default(key):
            continue
        option = f"--{key.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words.append(option if one is True else f"{option} {'DIR' if isinstance(one, Path) else one}")
    return " ".join(words)
