"""Files that other installed packages ship, found without importing those packages (nothing is ever downloaded)."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .errors import user_error


@cache
def package_file(package: str, name: str) -> str:
    """Path of the file `name` inside the folder of `package`; raises UserError when it is not installed."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / name
        if path.is_file():
            return str(path)
    raise user_error(
        f"Scenes need the file {name} of the Python package {package}: reinstall it (pip install {package})."
    )
