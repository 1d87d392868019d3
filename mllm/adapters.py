"""LoRA run directories: an adapter and the parts that were trained whole, beside the name of the model they belong to.

The files are peft's own (`adapter_config.json`, `adapter_model.safetensors`; parts trained whole are its
`modules_to_save`). Adapters are put into the model's layers in place, so that it stays a RegionLlava.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils.hub import cached_file

from ..vision_towers import UserError
from ..vision_towers.packaged import model_source
from ..vision_towers.weights_hash import weights_hash

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
BASE_FILE = "adapter_base.json"
_NAME = "default"  # peft's name of the only adapter
_PREFIX = "base_model.model."  # what peft's own wrapper puts before every name


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to. weights_sha256: of its files; None for one on a hub."""

    path: str
    weights_sha256: str | None


def adapter_base(source: str | Path) -> Base | None:
    """The base of the adapter that lies in `source` (a folder or a hub id); None when no adapter lies there."""
    config = _file(source, CONFIG_FILE)
    if config is None:
        return None
    path = json.loads(Path(config).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not path:
        raise UserError(f"{source}: {CONFIG_FILE} names no base model; write it into base_model_name_or_path.")
    about = _file(source, BASE_FILE)
    recorded = json.loads(Path(about).read_text(encoding="utf-8")) if about is not None else {}
    return Base(path, recorded.get("weights_sha256"))


def check_base(source: str | Path, base: Base) -> None:
    """Raise `UserError` when the base is not where it was, or is another model now."""
    folder = Path(model_source(base.path))
    if base.weights_sha256 is None:
        return
    mend = f"set base_model_name_or_path in {Path(str(source)) / CONFIG_FILE} to where it is."
    if not folder.is_dir():
        raise UserError(f"{source} is an adapter of the model at {base.path}, and nothing is there: {mend}")
    if weights_hash(folder) != base.weights_sha256:
        raise UserError(f"{source} is an adapter of another model than the one at {base.path} (weights differ): {mend}")


def attach_adapter(model: nn.Module, source: str | Path, quant: str = "none") -> None:
    """Put the adapter of `source` into `model`, which is its base, and load the parts that were trained whole.

    quant: how the model's weights are kept.
    Raises:
        UserError: the adapter does not fit the model.
    """
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(source))
    if config.use_dora and quant == "int8":
        raise UserError(f"{source} is a DoRA, which does not work on int8 weights; use nf4 or none.")
    config.modules_to_save, config.inference_mode = None, True
    inject_adapter(model, config)
    weights = _file(source, WEIGHTS_FILE)
    if weights is None:
        raise UserError(f"{source} holds no {WEIGHTS_FILE}.")
    state = {_memory_name(name): tensor for name, tensor in load_file(weights).items()}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    wrong = [name for name, value in state.items() if name not in tensors or tensors[name].shape != value.shape]
    wrong += [name for name in tensors if ".lora_" in name and name not in state]
    if wrong:
        raise UserError(f"{source} does not fit its base model: {len(wrong)} tensors, e.g. {wrong[0]}.")
    with torch.no_grad():
        for name, value in state.items():
            tensors[name].copy_(value)


def inject_adapter(model: Any, config: Any) -> None:
    """peft's adapter layers in place of those that `config` (a `LoraConfig`) targets; nothing else is touched."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, _NAME)
    model._hf_peft_config_loaded = True  # how transformers knows that a quantized model may train


def write_adapter(model: nn.Module, folder: Path, base: str, whole: Sequence[str]) -> None:
    """Write the adapter inside `model` and the parameters below the prefixes `whole`.

    Args:
        base: folder, packaged name or hub id of the model without adapter.
    """
    config = _config_of(model)
    config.modules_to_save = sorted({prefix.rpartition(".")[2] for prefix in whole}) or None
    is_folder = Path(base).is_dir() and model_source(base) == base
    config.base_model_name_or_path = str(Path(base).resolve()) if is_folder else base
    config.inference_mode = True
    config.save_pretrained(folder)
    state = {
        _file_name(name): parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name or any(name == prefix or name.startswith(prefix + ".") for prefix in whole)
    }
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    here = Path(model_source(base))
    record = {"path": config.base_model_name_or_path, "weights_sha256": weights_hash(here) if here.is_dir() else None}
    (folder / BASE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def merge_adapter(model: nn.Module) -> None:
    """Add the adapter to the weights it belongs to, in place; `model` has its own layers again.

    Raises:
        UserError: quantized weights, which would round the sum.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module, LoraLinear):
            raise UserError("an adapter cannot be merged into quantized weights; open the model without --quant.")
        module.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    model._hf_peft_config_loaded = False  # pyright: ignore[reportArgumentType]
    if hasattr(model, "peft_config"):
        del model.peft_config


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter is inside the model."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def _config_of(model: Any) -> Any:
    return model.peft_config[_NAME]


def _file(source: str | Path, name: str) -> str | None:
    """A file of a folder, or of a hub id."""
    folder = Path(source)
    if folder.is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    try:
        return cached_file(
            str(source),
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository: what opens the model says so
        return None


def _file_name(name: str) -> str:
    """A parameter's name in peft's files. DoRA's vectors lose their `.weight`."""
    return _PREFIX + name.replace(f".lora_magnitude_vector.{_NAME}.weight", ".lora_magnitude_vector").replace(
        f".{_NAME}.", "."
    )


def _memory_name(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    if name.endswith(".lora_magnitude_vector"):
        return f"{name}.{_NAME}.weight"
    place, dot, leaf = name.rpartition(".")
    return f"{place}.{_NAME}{dot}{leaf}" if place.endswith((".lora_A", ".lora_B")) else name
