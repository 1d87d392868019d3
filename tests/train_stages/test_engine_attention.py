"""Attention of bf16 training on a CPU: fp32 inside, bf16 outside, the same value."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regiontower.train_stages.engine.attention import attention_kernels, without_caches

CPU = torch.device("cpu")


def qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_bf16_attention_is_computed_in_fp32(mask: str | None) -> None:
    q, k, v = qkv()
    bias = torch.ones(7, 7, dtype=torch.bool).tril()
    scores = q.float() @ k.float().transpose(-1, -2) * 8**-0.5
    attn_mask = None
    if mask is not None:
        scores = scores.masked_fill(~bias, float("-inf"))
        attn_mask = bias if mask == "bool" else torch.zeros(7, 7).masked_fill(~bias, float("-inf")).bfloat16()
    expected = (scores.softmax(-1) @ v.float()).bfloat16()
    with attention_kernels(CPU, "bf16"), torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=8e-3, atol=1e-3)  # one rounding to bf16, no more
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.bfloat16


def test_autocast_goes_on_around_it() -> None:
    with attention_kernels(CPU, "bf16"), torch.autocast("cpu", torch.bfloat16):
        F.scaled_dot_product_attention(*qkv())
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_elsewhere_torch_chooses() -> None:
    with attention_kernels(CPU, "fp32"):
        q, k, v = (t.detach().float() for t in qkv())
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.float32


def test_no_part_keeps_a_cache_and_all_do_again_afterwards() -> None:
    class Part(nn.Module):
        def __init__(self, use_cache: bool) -> None:
            super().__init__()
            self.config = SimpleNamespace(use_cache=use_cache)

    model = nn.Sequential(Part(True), nn.Linear(1, 1), Part(False))
    model.append(Part(True))
    model[3].config = model[0].config  # one configuration, two modules
    with without_caches(model):
        assert not any(part.config.use_cache for part in model if isinstance(part, Part))
    assert [part.config.use_cache for part in model if isinstance(part, Part)] == [True, False, True]
