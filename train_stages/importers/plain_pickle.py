"""Read a pickle that holds nothing but plain values. A pickle is a program: whatever else it names is not run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from ...vision_towers.errors import UserError


class _PlainUnpickler(pickle.Unpickler):
    """Lists, tuples, dicts, sets, strings, bytes, numbers, booleans and None are made by opcodes of their own; every
    class and function, harmless or not, goes through `find_class`, and none is needed."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it wants to call {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside itself")


def load_plain_pickle(path: Path) -> Any:
    """The value in a pickle of containers, strings and numbers, of Python 2 or 3.

    Raises:
        UserError: the file cannot be read, is no pickle, or names any class or function: such a file could run code,
        and
            nothing of it is run here.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    try:
        # latin1: strings of Python 2 are bytes; this reads any of them.
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises all sorts of things
        raise UserError(
            f"{path}: is not a pickle of plain lists, dicts, strings and numbers ({error or type(error).__name__}); it "
            "was not run; get the file again from its own page."
        ) from None
