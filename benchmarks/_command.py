"""What to type for a benchmark's run, for its result."""

import argparse
from pathlib import Path


def typed(name: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """The command with every option that was not left alone. Paths of the machine are nobody's business: `DIR`."""
    together = {action.dest for action in parser._actions if action.nargs == "+"}  # one option with all its values
    words = [f"regiontower bench {name}"]
    for key, value in vars(arguments).items():
        if value == parser.get_default(key):
            continue
        option = f"--{key.replace('_', '-')}"
        values = ["DIR" if isinstance(one, Path) else one for one in (value if isinstance(value, list) else [value])]
        if key in together:
            words.append(" ".join(map(str, [option, *values])))
            continue
        words += [option if one is True else f"{option} {one}" for one in values]
    return " ".join(words)
