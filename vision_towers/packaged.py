"""The models that come with the package: names that stand for folders inside it."""

from importlib.resources import files
from pathlib import Path

WEIGHTS_FOLDER = Path(str(files(__name__.partition(".")[0]))) / "weights"


def packaged_models() -> tuple[str, ...]:
    """The names, sorted: `nano`, ..."""
    if not WEIGHTS_FOLDER.is_dir():
        return ()
    return tuple(sorted(folder.name for folder in WEIGHTS_FOLDER.iterdir() if (folder / "config.json").is_file()))


def model_source(name_or_path: str | Path) -> str:
    """What transformers should open: the folder of a packaged model, or the argument itself (a folder or hub id).

    A packaged name always means the packaged model; a folder of that name is written "./nano".
    """
    name = str(name_or_path)
    return str(WEIGHTS_FOLDER / name) if name in packaged_models() else name
