"""One rank of test_distributed: `ddp_rank.py RANK FOLDER KIND0 KIND1`; importable for its `batch`."""

import sys

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from regiontower.mllm import load_mllm

PROMPTS = {"regions": "<image>What is in <region>?", "image": "<image>Where is it?", "text": "none"}


def batch(processor, kind: str, seed: int) -> dict:
    pixels = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    pictures = None if kind == "text" else [Image.fromarray(pixels.numpy())]
    inputs = dict(processor(pictures, [PROMPTS[kind]], boxes=[[(10, 10, 60, 60)]] if kind == "regions" else None))
    return inputs | {"labels": inputs["input_ids"]}


def main(rank: int, folder: str, *kinds: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, processor = load_mllm(f"{folder}/model", device="cpu")
    wrapped = DistributedDataParallel(model.train())
    for step in range(2):
        wrapped(**batch(processor, kinds[rank], 10 * rank + step)).loss.backward()
    if rank == 0:
        torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, f"{folder}/grads.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
