"""The engines by name. A worker process finds its own here, so they are imported when asked for."""

from importlib import import_module

from ...vision_towers.errors import UserError
from .labeller import Engine

_MODULES = {"rice-ocr": "ocr", "rice-objects": "objects", "vesl": "vesl", "granular": "granular"}


def find_engine(name: str) -> Engine:
    """The engine called `name`.

    Raises:
        UserError: there is none; the sentence lists them.
    """
    if name not in _MODULES:
        raise UserError(f"there is no label engine {name!r}; choose among {', '.join(_MODULES)}.")
    return import_module(f".{_MODULES[name]}", __package__).ENGINE
