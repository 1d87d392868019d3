"""RICE sharded with FSDP2 over two processes gives the gradients of one process.

Run as a script with a rank, this file is one of the two processes.
"""

import subprocess
import sys

import torch

WORLD = 2


def test_sharded_gradients_equal_those_of_one_process(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            report, _ = process.communicate(timeout=150)
            assert process.returncode == 0, report.decode()[-3000:]
    finally:
        for process in processes:
            process.kill()


def build():
    """A small RICE tower, the same in every process."""
    from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel

    torch.manual_seed(0)
    model = RiceVisionModel(
        RiceVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
            initializer_factor=3.0,
        )
    )
    return model.train()


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two images a process; the numbers of boxes differ within and between processes."""
    generator = torch.Generator().manual_seed(10 + rank)
    corners = torch.rand(2, 3, 2, 2, generator=generator) * 56
    boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    return torch.randn(2, 3, 56, 56, generator=generator), boxes, torch.tensor([[3, 1], [0, 2]][rank])


def loss_of(model, rank: int) -> torch.Tensor:
    """A loss on regions, image tokens and the pooled image."""
    pixels, boxes, counts = batch(rank)
    output = model(pixels, boxes=boxes, region_counts=counts)
    return output.region_embeds.tanh().sum() + output.last_hidden_state.square().mean() + output.pooler_output.mean()


def work(rank: int, folder: str) -> None:
    """One of the two processes."""
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), rank=rank, world_size=WORLD
    )
    model = build()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    for step in range(2):  # a second step, because the first one sets FSDP up
        model.zero_grad()
        loss_of(model, (rank + step) % WORLD).backward()

    alone = build()
    (sum(loss_of(alone, other) for other in range(WORLD)) / WORLD).backward()  # FSDP averages
    for (name, sharded), (_, whole) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        difference = (sharded.grad.full_tensor() - whole.grad).abs().max()
        assert whole.grad.abs().max() > 0, name
        assert difference <= 1e-5 * max(1.0, float(whole.grad.abs().max())), (name, float(difference))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
