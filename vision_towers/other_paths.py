"""Other ways through a native module than its forward, without leaving it.

A block's weights may be called only in the block's own forward: that is where FSDP gathers them, compiled code replaces
it, and checkpoints are taken.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any


class _OtherPaths:
    """Mixed into the class of a native module: `module(x, path=f, ...)` is `f(module, x, ...)` in its forward."""

    def forward(self, *args: Any, path: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        native: Any = super()
        return native.forward(*args, **kwargs) if path is None else path(self, *args, **kwargs)


@cache
def _with_other_paths(kind: type) -> type:
    # Under the native name: FSDP finds by it what it shards as one.
    return type(kind.__name__, (_OtherPaths, kind), {})


def open_other_paths(modules: Iterable[Any]) -> None:
    """Let modules, in place, be called with `path=`; called without, they are what they were."""
    for module in modules:
        if not isinstance(module, _OtherPaths):
            module.__class__ = _with_other_paths(type(module))
