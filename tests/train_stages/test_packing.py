"""Rows that samples share: that samples do not see each other in them."""

from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, Lfm2Config, Lfm2Model, MistralConfig, MistralModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from regiontower.train_stages import packed_attention as packed_attention_module
from regiontower.train_stages.mllm_data import Sample, collate_samples
from regiontower.train_stages.packed_attention import PACKED_SDPA, flash_for, packed_attention, varlen_borders
from regiontower.train_stages.packing import collate_packed
from regiontower.vision_towers import UserError

CPU = torch.device("cpu")


def make_sample(processor, seed, words=8, boxes=1, picture=True):
    """A conversation with a picture, its regions and an answer of random words."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(100, 250, (words,), generator=generator).tolist()
    image = [processor.image_token_id] * processor.image_tokens(processor.frame((64, 64))) if picture else []
    asked = [processor.tokenizer.bos_token_id, *image, *([processor.region_token_id] * boxes)]
    pixels = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8).numpy() if picture else None
    corners = torch.rand(boxes, 2, generator=generator) * 30
    return Sample([*asked, *text], [-100] * len(asked) + text, pixels, torch.cat([corners, corners + 20], dim=1))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def mllm(request, make_tiny_mllm):
    return make_tiny_mllm(language=request.param)


@pytest.fixture
def samples(mllm):
    _, processor = mllm
    return [
        make_sample(processor, 0),
        make_sample(processor, 1, words=20, boxes=2),
        make_sample(processor, 2, boxes=0, picture=False),
        make_sample(processor, 3, words=3),
    ]


def logits_of(model, processor, rows, dtype=None):
    with torch.no_grad(), packed_attention(model.model.language_model, CPU, dtype):
        return model(**collate_packed(rows, processor=processor), use_cache=False).logits[0]


def test_a_neighbour_changes_no_logit(mllm, samples):
    """The leak test: text, picture and boxes of all other samples change, the logits of one do not, to the bit."""
    model, processor = mllm
    lengths = [len(sample.ids) for sample in samples]
    before = logits_of(model, processor, [samples[:2], samples[2:]]).split(lengths)
    for kept in range(len(samples)):
        others = [
            sample
            if number == kept
            else make_sample(processor, 10 + number, len(sample.labels) - sample.labels.count(-100), len(sample.boxes),
                             sample.pixels is not None)
            for number, sample in enumerate(samples)
        ]  # fmt: skip
        after = logits_of(model, processor, [others[:2], others[2:]]).split(lengths)
        assert torch.equal(before[kept], after[kept])
        assert all(not torch.equal(before[n], after[n]) for n in range(len(samples)) if n != kept)


def test_packed_logits_are_those_of_each_sample_alone(mllm, samples):
    model, processor = mllm
    packed = logits_of(model, processor, [samples]).split([len(sample.ids) for sample in samples])
    for sample, found in zip(samples, packed, strict=True):
        with torch.no_grad():
            alone = model(**collate_samples([sample], processor=processor), use_cache=False).logits[0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_loss_and_gradients_of_a_pack_are_those_of_a_padded_batch(mllm, samples):
    model, processor = mllm

    def learn(batch):
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with packed_attention(model.model.language_model, CPU):
        packed_loss, packed_grads = learn(collate_packed([samples[:3], samples[3:]], processor=processor))
    loss, grads = learn(collate_samples(samples, processor=processor))
    model.zero_grad()
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-6)
    assert packed_grads.keys() == grads.keys()
    for name, gradient in grads.items():
        worst = (packed_grads[name] - gradient).abs().max()
        assert worst <= 1e-4 * gradient.abs().max() + 1e-6, name


def test_without_borders_samples_do_see_each_other(mllm, samples):
    """What the leak test would find if it were so."""
    model, processor = mllm
    batch = collate_packed([samples], processor=processor)
    apart = logits_of(model, processor, [samples])
    with torch.no_grad():
        together = model(
            **{k: v for k, v in batch.items() if not k.startswith(("cu_", "max_", "position"))}, use_cache=False
        ).logits[0]
    first = len(samples[0].ids)
    torch.testing.assert_close(together[:first], apart[:first], rtol=1e-4, atol=1e-4)
    assert (together[first:] - apart[first:]).abs().max() > 1e-2


def test_no_sample_is_learned_from_the_one_before(mllm, samples):
    _, processor = mllm
    learned = [replace(sample, labels=list(sample.ids)) for sample in samples]
    batch = collate_packed([learned], processor=processor)
    starts = batch["cu_seq_lens_q"][:-1].long()
    assert (batch["labels"][0, starts] == -100).all() and (batch["position_ids"][0, starts] == 0).all()
    assert (batch["labels"] == -100).sum() == len(samples)


def test_flash_kernels_get_the_borders_they_take(mllm, samples, monkeypatch):
    """An attention of flash attention's kind (its name, its keywords, one row, no mask) gives the same logits."""
    model, processor = mllm
    seen = []

    def varlen(module, query, key, value, attention_mask, **kwargs):
        borders = kwargs.get("cu_seq_lens_q")
        if borders is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        assert attention_mask is None and query.shape[0] == 1
        assert borders.dtype == torch.int32 and torch.equal(borders, kwargs["cu_seq_lens_k"])
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(borders.diff().max())
        seen.append(borders.tolist())
        place = torch.arange(query.shape[2])
        sample = torch.bucketize(place, borders[1:].long(), right=True)
        mask = (sample[:, None] == sample[None]) & (place[:, None] >= place[None])
        return sdpa_attention_forward(module, query, key, value, mask[None, None], **kwargs)

    # transformers looks for a package wherever it reads "flash"; here is none, and a real kernel needs a GPU.
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *names, **options: None)
    AttentionInterface.register("flash_of_a_test", varlen)
    expected = logits_of(model, processor, [samples])
    language_model = model.model.language_model
    language_model.set_attn_implementation("flash_of_a_test")
    try:
        exact = logits_of(model, processor, [samples])
        assert not seen  # its kernels would not take float32
        found = logits_of(model, processor, [samples], torch.bfloat16)  # as autocast would have it
        assert language_model.config._attn_implementation == "flash_of_a_test"
    finally:
        language_model.set_attn_implementation("sdpa")
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    assert seen[-1] == [0, *lengths.cumsum(0).tolist()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(exact, expected)


def test_flash_attention_is_taken_where_it_takes_the_precision(monkeypatch):
    half, full, gpu = torch.bfloat16, torch.float32, torch.device("cuda")
    for installed in (True, False):
        monkeypatch.setattr(packed_attention_module, "is_flash_attn_2_available", lambda found=installed: found)
        assert flash_for("sdpa", gpu, half) == ("flash_attention_2" if installed else None)
        assert flash_for(None, gpu, torch.float16) == ("flash_attention_2" if installed else None)
        assert flash_for("flash_attention_3", gpu, half) == "flash_attention_3"
        assert flash_for("sdpa", CPU, half) is None
        for before in ("sdpa", "flash_attention_2", None):
            assert flash_for(before, gpu, full) is None


def test_the_precision_is_that_of_the_weights_unless_said(monkeypatch):
    asked = []
    monkeypatch.setattr(packed_attention_module, "flash_for", lambda before, device, dtype: asked.append(dtype))
    model = MistralModel(MistralConfig(**SIZES, **HEADS))
    for dtype in (None, torch.bfloat16):
        with packed_attention(model, CPU, dtype):
            assert model.config._attn_implementation == PACKED_SDPA
    assert asked == [torch.float32, torch.bfloat16]


SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}


@torch.no_grad()
def test_layers_that_look_back_a_little_do_so_in_a_pack():
    torch.manual_seed(0)
    model = MistralModel(MistralConfig(**SIZES, **HEADS, sliding_window=3)).eval()
    ids, lengths = torch.randint(0, 50, (1, 20)), [9, 2, 9]
    alone = [model(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(lengths, 1)]
    with packed_attention(model, CPU):
        packed = model(input_ids=ids, use_cache=False, **varlen_borders(lengths)).last_hidden_state
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@torch.no_grad()
def test_calls_without_borders_are_answered_as_before(mllm):
    language_model = mllm[0].model.language_model
    ids = torch.randint(100, 250, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = language_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    with packed_attention(language_model, CPU):
        assert language_model.config._attn_implementation == PACKED_SDPA
        found = language_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(found[mask.bool()], expected[mask.bool()])
    assert language_model.config._attn_implementation == "sdpa"


def test_a_model_that_mixes_tokens_elsewhere_is_refused():
    """A convolution over the row carries the end of one sample into the next."""
    torch.manual_seed(0)
    model = Lfm2Model(Lfm2Config(**SIZES, **HEADS, layer_types=["conv", "full_attention"]))
    with (
        pytest.raises(UserError, match=r"see each other in a lfm2; set data\.batches=grouped"),
        packed_attention(model, CPU),
    ):
        pass
    assert model.config._attn_implementation == "sdpa"
