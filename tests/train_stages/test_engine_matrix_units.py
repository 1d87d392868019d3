"""Where bf16 costs time instead of saving it."""

import pytest
import torch

from regiontower.train_stages.engine.matrix_units import slow_bf16

WITH, WITHOUT, ARM = (
    {"architecture": "x86_64", "amx_bf16": True},
    {"architecture": "x86_64"},
    {"architecture": "aarch64"},
)


@pytest.mark.parametrize(
    ("device", "precision", "can", "slow"),
    [
        ("cpu", "bf16", WITHOUT, True),
        ("cpu", "bf16", WITH, False),
        ("cpu", "bf16", ARM, False),
        ("cpu", "fp32", WITHOUT, False),
        ("meta", "bf16", WITHOUT, False),
    ],
)
def test_bf16_is_slow_on_an_x86_processor_without_matrix_units(monkeypatch, device, precision, can, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert slow_bf16(torch.device(device), precision) is slow


def test_what_torch_says_of_this_processor_can_be_read():
    assert torch.cpu.get_capabilities()["architecture"]
