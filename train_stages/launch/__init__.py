"""Launch files for `accelerate launch`: the same recipe on many GPUs.

accelerate launch --config_file $(python -m regiontower.train_stages.launch fsdp2) -m regiontower instruct ...
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def launch_names() -> list[str]:
    """`ddp`, `fsdp2`, `zero2`, `zero3`."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def launch_file(name: str) -> Path:
    """The file to give to `accelerate launch --config_file`.

    Raises:
        UserError: there is none of this name.
    """
    if name not in launch_names():
        from ...vision_towers.errors import UserError  # behind it torch is imported

        raise UserError(f"There is no launch file {name!r}; there are {', '.join(launch_names())}.")
    return _FOLDER / f"{name}.yaml"
