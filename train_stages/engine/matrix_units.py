"""Whether bf16 is worth it here: processors without matrix units compute it more slowly than float32."""

from __future__ import annotations

import torch

NOTE = (
    "bf16 is slower than fp32 on this processor, which has no matrix units (AMX): a new run with "
    "train.precision=fp32 takes less time."
)


def slow_bf16(device: torch.device, precision: str) -> bool:
    """True on an x86 CPU without AMX, where a stage is to compute in bf16. Of other processors nothing is known."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # older torch cannot tell
    if device.type != "cpu" or precision != "bf16" or ask is None:
        return False
    can = ask()
    return can.get("architecture") == "x86_64" and not can.get("amx_bf16", False)
