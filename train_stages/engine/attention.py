"""Which attention kernels training runs on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_kernels(device: torch.device, precision: str) -> AbstractContextManager:
    """A context for training: torch's choice, except in bf16 on a CPU, where attention is plain matrix products.

    torch's CPU flash kernel takes several times as long backward in bf16 as in fp32; plain products run on the
    processor's matrix units.
    """
    if device.type == "cpu" and precision == "bf16":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
