"""`swap_vision_tower` for checkpoints of any size: files in, files out, one piece of a tensor in memory at a time.

The swap itself is the one in memory, done on a model without memory: afterwards every tensor that has some is new, and
every other one is taken from the checkpoint as bytes. A file that holds nothing else is linked.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
)

from ..vision_towers import UserError
from ..vision_towers.errors import CANNOT_OPEN, in_one_line
from .checkpoint import INDEX, Checkpoint, memory_name
from .follow_tower import family_of
from .fresh import with_more_rows
from .shard_files import Proof, Stored, copy_tensors, prove_tensors, read_tensor, same_file

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Rewritten:
    """A new checkpoint that is not in its place yet.

    Args:
        folder: where it stands. kept: proofs of the tensors taken from the source, by their names in memory.
        linked: how many files are the source's own. resumed: how many were there from an earlier try.
    """

    folder: Path
    kept: dict[str, Proof]
    linked: int
    resumed: int


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, processor) of a checkpoint, the model on the meta device: sizes without weights.

    Args:
        dtype: of the weights; as saved when absent.
    Raises:
        UserError: another kind of model, or files that transformers cannot read.
    """
    folder = checkpoint.folder
    try:
        config = AutoConfig.from_pretrained(folder)
        family_of(config)
        processor = AutoProcessor.from_pretrained(folder)
    except UserError:
        raise
    except CANNOT_OPEN as error:
        raise UserError(f"{folder} cannot be opened: {in_one_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{folder} has a tokenizer and no processor; add preprocessor_config.json of its model.")
    dtype = dtype or saved_dtype(checkpoint)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    config.dtype = dtype
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), processor


def saved_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the language model in the files."""
    for header in checkpoint.headers.values():
        for name, stored in header.items():
            if memory_name(name).startswith("model.language_model.") and stored.code in ("F32", "BF16", "F16"):
                return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[stored.code]
    raise UserError(f"{checkpoint.folder} holds no language model in fp32, bf16 or fp16.")


def rewrite(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    processor: Any,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
) -> Rewritten:
    """Write a swapped model beside `out`: its new tensors, and the checkpoint's for those on the meta device.

    An interrupted try is taken up: files that were finished are not written again.

    Args:
        model, processor: from `swap_vision_tower` (and `add_regions`) on an `empty_model`.
        dtype: to convert the checkpoint's tensors to; as they are when absent.
    Raises:
        UserError: the checkpoint lacks tensors of the model, or has them in another shape.
    """
    state = _state(model)
    new = {name: tensor for name, tensor in state.items() if not tensor.is_meta}
    kept, grown = _match(checkpoint, {name: tensor for name, tensor in state.items() if tensor.is_meta})
    new |= {name: _grown(checkpoint, *place, state[name].shape[0], dtype) for name, place in grown.items()}

    stage = out.with_name(f".{out.name}.partial")
    files = {file: names for file, names in kept.items() if names}
    total = len(files) + 1
    targets = {file: f"model-{number:05}-of-{total:05}.safetensors" for number, file in enumerate(files, start=1)}
    earlier = _take_up(stage, _signature(checkpoint, kept, dtype))
    done = {
        file: about
        for file, about in earlier.items()
        if _still_there(about, checkpoint.folder / file, stage / targets[file])
    }
    resumed = sum(file in done for file in files)

    def keep(file: str) -> tuple[str, dict[str, Proof], bool]:
        names, source, target = files[file], checkpoint.folder / file, stage / targets[file]
        whole = len(names) == len(checkpoint.headers[file])
        unchanged = all(stored.in_dtype(dtype)[0] == stored.code for stored in names.values())
        if whole and unchanged:
            linked = same_file(source, target)
            wanted = prove_tensors(source, names)  # of a link they are the target's, too
        else:
            linked = False
            wanted = copy_tensors(source, names, target, None if unchanged else dtype)
        if not linked:
            _compare(wanted, prove_tensors(target, names), target)
        return file, wanted, linked

    # Hashing and copying leave the interpreter's lock alone: two files at a time.
    with ThreadPoolExecutor(2) as pool:
        for file, proofs, linked in pool.map(keep, [file for file in files if file not in done]):
            done[file] = {"linked": linked, "proofs": {name: asdict(proof) for name, proof in proofs.items()}}
            _write_json(stage / PROGRESS, {**json.loads((stage / PROGRESS).read_text()), "done": done})

    last = f"model-{total:05}-of-{total:05}.safetensors"
    named = checkpoint.named(model, {name: tensor.contiguous() for name, tensor in new.items()})
    save_file(named, stage / last, metadata={"format": "pt"})
    weight_map = {name: targets[file] for file, names in files.items() for name in names} | dict.fromkeys(named, last)
    size = sum(stored.in_dtype(dtype)[1] for names in files.values() for stored in names.values())
    size += sum(tensor.nbytes for tensor in named.values())
    _write_json(stage / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    _save_settings(model, processor, stage)
    proofs = {memory_name(name): proof for file in files for name, proof in _proofs(done[file]).items()}
    return Rewritten(stage, proofs, sum(done[file]["linked"] for file in files), resumed)


def put_in_place(stage: Path, out: Path) -> None:
    """Give a finished checkpoint its name."""
    (stage / PROGRESS).unlink(missing_ok=True)
    if out.is_dir():
        out.rmdir()  # `new_folder` has seen that it is empty
    stage.rename(out)


def _state(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: of tied ones only the first."""
    state = model.state_dict()
    tied = model.lm_head.weight is model.get_input_embeddings().weight or model.config.tie_word_embeddings
    return {name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


Places = dict[str, dict[str, Stored]]


def _match(checkpoint: Checkpoint, wanted: Mapping[str, torch.Tensor]) -> tuple[Places, dict[str, tuple[str, Stored]]]:
    """What stays in each file, and which tensors there need more rows (memory name -> file and place)."""
    kept, grown, missing = {}, {}, set(wanted)
    for file, header in checkpoint.headers.items():
        kept[file] = {}
        for name, stored in header.items():
            memory = memory_name(name)
            tensor = wanted.get(memory)
            if tensor is None and not _stays(memory):
                continue
            missing.discard(memory)
            if tensor is None or tuple(tensor.shape) == stored.shape:
                kept[file][name] = stored
            elif tensor.shape[1:] == stored.shape[1:] and tensor.shape[0] > stored.shape[0]:
                grown[memory] = (file, stored)
            else:
                raise UserError(
                    f"{checkpoint.folder} does not fit its config: {name} is {stored.shape} and should be "
                    f"{tuple(tensor.shape)}."
                )
    if missing:
        raise UserError(f"{checkpoint.folder} lacks {len(missing)} tensors of its model, e.g. {min(missing)}.")
    return kept, grown


def _stays(memory: str) -> bool:
    """Whether a tensor that the model does not name is kept: what belongs to no part that was replaced is not ours to
    judge, but for the rotary frequencies of old files, which are computed now, and a head that is tied."""
    replaced = ("model.vision_tower.", "model.multi_modal_projector.", "model.region_projector.", "lm_head.")
    return not memory.startswith(replaced) and not memory.endswith("rotary_emb.inv_freq")


def _grown(checkpoint: Checkpoint, file: str, stored: Stored, rows: int, dtype: torch.dtype | None) -> torch.Tensor:
    table = read_tensor(checkpoint.folder / file, stored)
    return with_more_rows(table if dtype is None else table.to(dtype), rows)


def _compare(wanted: Mapping[str, Proof], found: Mapping[str, Proof], path: Path) -> None:
    for name, proof in wanted.items():
        if found.get(name) != proof:
            raise UserError(f"{path} does not hold {name} as it was written; check the disk and swap again.")


def _signature(checkpoint: Checkpoint, kept: Places, dtype: torch.dtype | None) -> str:
    """What the files of an interrupted try must have been made from to be of use."""
    stats = {file: (checkpoint.folder / file).stat() for file in kept}
    parts = [str(checkpoint.folder.resolve()), str(dtype)]
    parts += [f"{file} {stat.st_size} {stat.st_mtime_ns} {sorted(kept[file])}" for file, stat in sorted(stats.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _take_up(stage: Path, signature: str) -> dict[str, Any]:
    """The finished files of an earlier try of the same swap; anything else there is cleared away."""
    progress = stage / PROGRESS
    if progress.is_file():
        earlier = json.loads(progress.read_text())
        if earlier["signature"] == signature:
            return earlier["done"]
    if stage.exists():
        shutil.rmtree(stage)
    stage.mkdir(parents=True)
    _write_json(progress, {"signature": signature, "done": {}})
    return {}


def _proofs(about: dict[str, Any]) -> dict[str, Proof]:
    """Of a finished file, as `progress.json` has them."""
    return {name: Proof(p["dtype"], tuple(p["shape"]), p["sha256"]) for name, p in about["proofs"].items()}


def _still_there(about: dict[str, Any], source: Path, target: Path) -> bool:
    """Whether a file that an earlier try finished is what it was then: it may have gone, or the power with it."""
    if not target.is_file():
        return False
    if about["linked"]:
        return target.samefile(source)
    proofs = _proofs(about)
    try:
        return prove_tensors(target, proofs) == proofs
    except UserError:
        return False


def _save_settings(model: Any, processor: Any, folder: Path) -> None:
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _write_json(path: Path, content: Any) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
