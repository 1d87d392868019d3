"""Texts that share a row: how rows are filled, and that each text is read as if it were alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel

from regiontower.vision_towers.pack_rows import pack_rows
from regiontower.vision_towers.text_tower import text_states

END = 7


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 300))
def test_every_sequence_is_in_one_row_and_no_row_is_too_long(lengths, row_tokens):
    rows = pack_rows(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= row_tokens for row in rows)
    assert not lengths or len(rows) < 2 * sum(lengths) / row_tokens + 1  # no two rows would fit into one


def test_rows_are_filled_better_than_in_order():
    assert sorted(map(sorted, pack_rows([6, 5, 4, 5], 10))) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="11 tokens does not fit"):
        pack_rows([11], 10)


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=50, max_position_embeddings=12, bos_token_id=END, eos_token_id=END, **sizes)
    return CLIPTextModel(config)


def texts_of(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return torch.randint(8, 50, mask.shape, generator=generator) * mask, mask


def alone(tower, ids, mask):
    """What transformers gives for each text without the others."""
    rows = [
        tower(input_ids=row[shown.bool()][None]).last_hidden_state[0, -1] for row, shown in zip(ids, mask, strict=True)
    ]
    return torch.stack(rows)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_states_are_those_of_each_text_alone(tower, lengths):
    ids, mask = texts_of(lengths)
    torch.testing.assert_close(text_states(tower, ids, mask), alone(tower, ids, mask))


def test_gradients_are_those_of_each_text_alone(tower):
    ids, mask = texts_of([12, 3, 4, 1, 5, 3, 9])
    found = []
    for states in (text_states(tower, ids, mask), alone(tower, ids, mask)):
        tower.zero_grad()
        (states * torch.arange(states.numel()).reshape(states.shape).cos()).sum().backward()
        found.append({name: weight.grad.clone() for name, weight in tower.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-4)


def test_short_texts_share_rows_of_one_pass(tower):
    ids, mask = texts_of([12, 3, 4, 1, 5, 3, 9])  # 37 tokens
    shapes = []
    hook = tower.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    text_states(tower, ids, mask)
    text_states(tower, *texts_of([5, 5, 5]))
    hook.remove()
    assert shapes == [(4, 12), (3, 5)]


def test_attention_without_such_masks_gets_padded_rows(tower):
    ids, mask = texts_of([12, 3, 4, 1])
    expected = text_states(tower, ids, mask)
    tower.config._attn_implementation = "eager"
    try:
        torch.testing.assert_close(text_states(tower, ids, mask), expected)
    finally:
        tower.config._attn_implementation = "sdpa"
