"""How fast a run is and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# Dense bf16 matrix products a second, of the makers' data sheets; a name is looked for inside the device's name, so the
# longer of two that fit stands first.
_SHEETS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250": 362e12,
}


@dataclass(frozen=True)
class Work:
    """What one forward and backward of a batch does in one process.

    tokens: positions of the language model that are no padding. flops: floating-point operations of the model's matrix
    products, without recomputation and padding; 0 when nobody counts them.
    """

    tokens: float | torch.Tensor
    flops: float | torch.Tensor = 0.0


CountWork = Callable[[Mapping[str, Any]], Work]


@dataclass
class Throughput:
    """Adds up what happens between two log rows. `now`: seconds of training so far."""

    now: Callable[[], float]
    device: torch.device
    dtype: torch.dtype
    count: CountWork | None = None
    _since: float = 0.0
    _waited: float = 0.0
    _works: list[Work] = field(default_factory=list)
    _peak: float | None = None

    def start(self) -> None:
        """Training begins; with a count of operations, what the device could do is found out first."""
        if self.count is not None:
            self._peak = peak_flops(self.device, self.dtype)
        self._since = self.now()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time until each is there is noted as waiting."""
        while True:
            began = time.monotonic()
            batch = next(batches, _END)
            self._waited += time.monotonic() - began
            if batch is _END:
                return
            yield batch

    def add(self, batch: Mapping[str, Any]) -> None:
        """One more batch of this process."""
        if self.count is not None:
            self._works.append(self.count(batch))

    def take(self) -> dict[str, float]:
        """Figures since the last call, over all processes, which call together.

        data_wait: share of the time in which the training process waited for data. tokens_per_s: without padding.
        mfu: model FLOPs utilisation, `flops` over what the devices could have done (Chowdhery et al. 2022, PaLM,
        appendix B); an estimate.
        """
        now = self.now()
        seconds, self._since = max(now - self._since, 1e-9), now
        mine = [
            min(1.0, self._waited / seconds),
            sum(float(work.tokens) for work in self._works),
            sum(float(work.flops) for work in self._works),
        ]
        self._waited, self._works = 0.0, []
        everyone: list[Any] = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        waits, tokens, flops = (list(column) for column in zip(*everyone, strict=True))
        figures = {"data_wait": sum(waits) / len(waits)}
        if sum(tokens):
            figures["tokens_per_s"] = sum(tokens) / seconds
        if self._peak and sum(flops):
            figures["mfu"] = sum(flops) / seconds / (self._peak * len(everyone))
        return {name: round(value, 6) for name, value in figures.items()}


_END = object()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that `device` can do at most in matrix products of `dtype`.

    For a GPU of `_SHEETS` in bf16 the maker's number; for everything else the best of a few large products measured
    here and now, on as many threads as training has.
    """
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in _SHEETS.items():
            if part in name:
                return flops
    side = 512 if device.type == "cpu" else 4096
    square = torch.ones(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        _wait_for(device)
        began = time.monotonic()
        torch.mm(square, square)
        _wait_for(device)
        best = min(best, time.monotonic() - began)
    return 2 * side**3 / max(best, 1e-9)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
