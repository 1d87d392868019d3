"""A model that FSDP or DeepSpeed is about to cut: class centres are refused, blocks are named, boxes stay float32."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, Trainer

from regiontower.train_stages.class_shard import ClassShard
from regiontower.train_stages.engine import Part
from regiontower.train_stages.engine.cutting import before_cutting
from regiontower.train_stages.engine.trainer import StageTrainer
from regiontower.vision_towers import RoiVisionModel
from regiontower.vision_towers.errors import UserError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Centres(nn.Module):
    def __init__(self, group=None):
        super().__init__()
        self.class_shards = {"centres": ClassShard(7, 0, 4, group)}
        self.centres = nn.Parameter(torch.ones(4, 3))


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_class_centres_are_not_cut_a_second_time(engine, monkeypatch):
    def as_launched(self, model, *args, **kwargs):
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False
        setattr(self, engine, True)
        self.accelerator = SimpleNamespace(state=SimpleNamespace())

    monkeypatch.setattr(Trainer, "__init__", as_launched)
    monkeypatch.setattr(Trainer, "remove_callback", lambda self, callback: None)
    names = ["args", "train", "clock", "dataset", "collate", "on_batch", "on_row", "throughput"]
    options = {**dict.fromkeys(names), "parts": [Part("all", ("",), 0.1)], "callbacks": []}
    with pytest.raises(UserError, match=r"class centres, .* cut the slices once more .*: launch with ddp\.$") as error:
        StageTrainer(model=Centres(group=object()), **options)
    assert "\n" not in str(error.value)
    StageTrainer(model=Centres(), **options)  # whole, in a single process


class Pair(nn.Module):
    """As the objectives of stage 0: no model of transformers itself."""

    def __init__(self):
        super().__init__()
        self.tower = RoiVisionModel.from_native(CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=56)))
        self.text = CLIPTextModel(CLIPTextConfig(**SIZES, vocab_size=40))


def test_blocks_are_found_and_inputs_stay_as_they_are():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_mixed_precision("bf16")
    model = Pair()
    before_cutting(model, plugin)
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype is torch.bfloat16 and not policy.cast_forward_inputs and policy.output_dtype is None
    plugin.set_auto_wrap_policy(model)
    kinds = {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert kinds == {"CLIPEncoderLayer", "CLIPTextEmbeddings", "CLIPVisionEmbeddings"}
    # The tower alone names an embedding that only its text tower has, which accelerate would refuse.
    assert "CLIPTextEmbeddings" in model.tower._no_split_modules
    before_cutting(model.tower, plugin)
    assert model.tower._no_split_modules == {"CLIPEncoderLayer", "CLIPVisionEmbeddings"}
