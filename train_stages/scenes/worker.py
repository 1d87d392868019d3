"""`python -m regiontower.train_stages.scenes.worker JOB`: the second process of `write_scenes`; JOB is its JSON."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from .generate import generate_scene
from .presets import ScenePreset
from .write import save_scene


def main(job_text: str) -> None:
    """Write the pictures of the job's seeds and print one record a line, in order."""
    job = json.loads(job_text)
    numbers: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in job["preset"].items()
    }
    rules = ScenePreset(**numbers)
    for seed in range(*job["seeds"]):
        sys.stdout.write(save_scene(generate_scene(seed, rules, job["words"]), Path(job["out"])))
        sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the first process, which then ends this one
    main(sys.argv[1])
