"""The random state of a process, kept around work that draws from it."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """lmms-eval seeds every generator of the process; a training run around it must not notice."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():  # the CPU's and every CUDA device's
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
