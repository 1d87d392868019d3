"""UMG-CLIP sharded with FSDP2, block by block, gives the gradients of one process."""

import copy

import pytest
import torch

from regiontower.vision_towers import UmgClipVisionModel

CASES = {"value": ("clip", {}), "map": ("siglip", {}), "merged": ("mlcd", {"reduce_after": 2, "reduce_to": 0.5})}


def loss_of(model, rank: int) -> torch.Tensor:
    """A loss on regions, patches and the pooled image."""
    generator = torch.Generator().manual_seed(10 + rank)
    corners = torch.rand(2, 3, 2, 2, generator=generator) * 56
    boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    pixels = torch.randn(2, 3, 56, 56, generator=generator)
    seen = model(pixels, boxes, torch.tensor([3, 1]), output_dense_features=True)
    return seen.region_embeds.tanh().sum() + seen.dense_features.square().mean() + seen.pooler_output.mean()


def work(rank: int, model) -> float:
    """The largest difference of any gradient, in units of the largest of its tensor; two steps, the first sets up."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, mesh = copy.deepcopy(model), init_device_mesh("cpu", (2,))
    heads = [model.tower.head] if hasattr(model.tower, "head") else []
    for module in (*model.tower.encoder.layers, *heads):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for step in range(2):
        model.zero_grad()
        loss_of(model, (rank + step) % 2).backward()
    (sum(loss_of(alone, other) for other in range(2)) / 2).backward()  # FSDP averages
    worst = 0.0
    for sharded, whole in zip(model.parameters(), alone.parameters(), strict=True):
        if not whole.requires_grad:
            continue
        assert whole.grad.abs().max() > 0
        worst = max(worst, float((sharded.grad.full_tensor() - whole.grad).abs().max() / whole.grad.abs().max()))
    return worst


@pytest.mark.parametrize("case", CASES)
def test_sharded_gradients_equal_those_of_one_process(native, in_processes, case):
    name, fields = CASES[case]
    model = UmgClipVisionModel.from_native(native(name), **fields).train()
    for key, weight in model.named_parameters():  # a softmax takes no notice of a bias of its keys
        weight.requires_grad_("k_proj.bias" not in key and "in_proj_bias" not in key)
    assert max(in_processes(2, work, model)) < 1e-4
