"""TensorBoard, Weights & Biases and the other trackers of transformers: where they write, and that they are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback

from ...vision_towers.errors import UserError

TENSORBOARD_FOLDER = "tensorboard"
# Modules, of which one must be there, where they are not called as the tracker is; kubeflow needs none.
_MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "kubeflow": (),
}
_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}  # where pip has another name


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise `UserError` when a tracker that a recipe names is not installed."""
    for name in report_to:
        modules = _MODULES.get(name, (name,))
        if modules and not any(find_spec(module) for module in modules):
            raise UserError(
                f"train.report_to names {name}, which is not installed: pip install {_PACKAGES.get(name, name)}."
            )


def tracker_callbacks(report_to: Sequence[str], run_dir: Path, step: int) -> list[TrainerCallback]:
    """Callbacks to take the place of transformers' own ones, for this process alone.

    TensorBoard writes to `run_dir/tensorboard` and forgets what was logged behind `step`, where a resumed run takes up;
    W&B calls its project "regiontower" unless WANDB_PROJECT says otherwise.
    """
    if "wandb" in report_to:
        os.environ.setdefault("WANDB_PROJECT", "regiontower")
    if "tensorboard" not in report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=step + 1))]
