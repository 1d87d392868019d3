"""Every objective of stage 0 sharded with FSDP2 gives the loss and the gradients of one process."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from regiontower.train_stages.class_shard import ClassShard
from regiontower.train_stages.clip_objective import ClipConfig, ClipObjective
from regiontower.train_stages.cloc_objective import ClocLossConfig, ClocObjective
from regiontower.train_stages.cluster_loss import ClusterLossConfig
from regiontower.train_stages.engine.cutting import before_cutting
from regiontower.train_stages.rice_objective import RiceConfig, RiceObjective
from regiontower.train_stages.umg_clip_objective import UmgClipLossConfig, UmgClipObjective
from regiontower.vision_towers import (
    ClocConfig,
    ClocModel,
    ClocVisionModel,
    RiceVisionConfig,
    RiceVisionModel,
    UmgClipConfig,
    UmgClipModel,
    UmgClipVisionModel,
)

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES, CLASSES, TOKENS, BANK = 4, 7, 9, 6


def vit():
    return CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=56, patch_size=14))


def text_config():
    return CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=3,
    )  # fmt: skip


def rice():
    tower = RiceVisionModel(RiceVisionConfig(**SIZES, image_size=56, patch_size=14, num_region_layers=1))
    return RiceObjective(tower, CLASSES, TOKENS, RiceConfig(loss=ClusterLossConfig(sample_rate=1.0)))


def clip():
    tower = RiceVisionModel(RiceVisionConfig(**SIZES, image_size=56, patch_size=14, num_region_layers=1))
    return ClipObjective(tower, 40, 3, ClipConfig(embed_dim=16, text_hidden=16, text_layers=1, text_heads=2))


def cloc():
    tower = ClocVisionModel.from_native(vit(), projection_dim=16)
    model = ClocModel(ClocConfig(vision_config=tower.config, text_config=text_config()))
    return ClocObjective(model, ClocLossConfig())


def umg_clip():
    tower = UmgClipVisionModel.from_native(vit())
    model = UmgClipModel(UmgClipConfig(vision_config=tower.config, text_config=text_config(), projection_dim=16))
    tags = torch.stack([torch.arange(4, 4 + BANK), torch.full((BANK,), 3)], dim=1)
    return UmgClipObjective(model, tags, torch.ones_like(tags), UmgClipLossConfig(pixel_caption=0.3))


OBJECTIVES = {"rice": rice, "clip": clip, "cloc": cloc, "umg_clip": umg_clip}


def batch(name, images=slice(None), with_regions=IMAGES):
    """Those of the four images; each has two regions, or those from the `with_regions`-th on have none."""
    draw = torch.Generator().manual_seed(2)
    corners = torch.rand(IMAGES, 2, 2, 2, generator=draw) * 28
    texts = torch.randint(4, 40, (3 * IMAGES, 5), generator=draw)
    texts[:, -1] = 3
    have = torch.arange(IMAGES) < with_regions
    of_images, of_regions = texts[:IMAGES][images], texts[IMAGES:].unflatten(0, (IMAGES, 2))[images]
    of_regions = of_regions[have[images]].flatten(0, 1)
    found = {
        "pixel_values": torch.randint(0, 256, (IMAGES, 3, 56, 56), generator=draw, dtype=torch.uint8)[images],
        "boxes": torch.cat([corners[:, :, 0], corners[:, :, 0] + 8 + corners[:, :, 1] / 2], dim=-1)[images],
        "region_counts": (2 * have)[images],
    }
    labels = {
        "object_labels": torch.randint(0, CLASSES, (IMAGES, 2), generator=draw)[images],
        "ocr_labels": torch.randint(0, TOKENS, (IMAGES, 2, 1), generator=draw)[images],
    }
    if name == "rice":
        return found | {
            key: value.where(have[images].view(-1, *[1] * (value.ndim - 1)), -1) for key, value in labels.items()
        }
    captions = {"input_ids": of_images, "attention_mask": torch.ones_like(of_images)}
    if name == "clip":
        return {"pixel_values": found["pixel_values"], **captions}
    regions = {"region_input_ids": of_regions, "region_attention_mask": torch.ones_like(of_regions)}
    if name == "cloc":
        return found | captions | regions
    tags = {
        "captioned": torch.ones(len(of_images), dtype=torch.bool),
        "image_tags": torch.randint(0, BANK, (IMAGES, 2), generator=draw)[images],
        "region_tags": torch.randint(0, BANK, (IMAGES, 2, 1), generator=draw)[images],
        "masks": torch.rand(IMAGES, 2, 4, 4, generator=draw)[images],
        "tag_seed": torch.tensor(3),
    }
    return found | captions | regions | tags


def made(name):
    torch.manual_seed(0)
    objective = OBJECTIVES[name]()
    for module in objective.modules():  # the processes must not draw other dropouts than one alone
        assert not (isinstance(module, torch.nn.Dropout) and module.p)
    return objective


def work(rank, name, with_regions):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    objective, mesh = made(name), init_device_mesh("cpu", (2,))
    shards = getattr(objective, "class_shards", {})
    own = {parameter for key, parameter in objective.named_parameters() if key in shards}
    blocks = [module for path, module in objective.named_modules() if path.rpartition(".")[0].endswith("layers")]
    for module in blocks:
        fully_shard(module, mesh=mesh)
    fully_shard(objective, mesh=mesh, ignored_params=own)
    assert all(isinstance(p, DTensor) for key, p in objective.named_parameters() if key not in shards) and blocks
    loss = objective(**batch(name, slice(2 * rank, 2 * rank + 2), with_regions)).loss
    loss.backward()
    whole = {k: p.grad.full_tensor() for k, p in objective.named_parameters() if k not in shards and p.grad is not None}
    return loss.detach(), whole, {key: objective.get_parameter(key).grad for key in shards}


# Where the second process has no region, its towers must run as often as the first one's: FSDP would wait for ever.
@pytest.mark.parametrize(
    ("name", "with_regions"), [*((name, IMAGES) for name in OBJECTIVES), ("rice", 2), ("cloc", 2), ("umg_clip", 2)]
)
def test_two_sharded_processes_equal_one(in_processes, name, with_regions):
    alone = made(name)
    loss = alone(**batch(name, with_regions=with_regions)).loss
    loss.backward()
    (first, grads, mine), (second, _, theirs) = in_processes(2, work, name, with_regions)
    torch.testing.assert_close((first + second) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
    for key, parameter in alone.named_parameters():
        if key in mine:
            shard = ClassShard.mine(len(parameter))
            assert shard.size == len(parameter)  # this process is alone
            found = torch.cat([mine[key], theirs[key]])
        elif parameter.grad is None:
            assert key not in grads
            continue
        else:
            found = grads[key]
        worst = float((found - parameter.grad).abs().max())
        assert worst <= 1e-3 * float(parameter.grad.abs().max()) + 1e-6, (key, worst)


def by_accelerate(rank, name):
    """Loss and blocks of an objective as accelerate cuts it for a recipe in bf16."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_mixed_precision("bf16")
    objective = made(name)
    before_cutting(objective, plugin)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("shard",)),
        mixed_precision="bf16",
        is_main_process=not rank,
        device=torch.device("cpu"),
    )
    fsdp2_prepare_model(accelerator, objective)
    with torch.autocast("cpu", torch.bfloat16):  # as accelerate runs the forward
        loss = objective(**batch(name, slice(2 * rank, 2 * rank + 2))).loss
    loss.backward()
    return loss.detach(), [key for key, module in objective.named_modules() if isinstance(module, FSDPModule)]


@pytest.mark.parametrize("name", ["clip", "cloc", "umg_clip"])
def test_accelerate_cuts_the_blocks_and_boxes_stay_float32_in_bf16(in_processes, name):
    with torch.no_grad():
        loss = made(name)(**batch(name)).loss
    (first, blocks), (second, _) = in_processes(2, by_accelerate, name)
    torch.testing.assert_close((first + second) / 2, loss, rtol=0.02, atol=0)  # float32, too
    assert sum(".layers." in key for key in blocks) >= 2 and "" in blocks
