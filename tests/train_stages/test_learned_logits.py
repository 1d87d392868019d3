"""Logits where something is learned: fewer of them, the same loss and gradients."""

import random

import pytest
import torch

from regiontower.train_stages.learned_logits import learned_logits
from regiontower.train_stages.mllm_data import ConversationDataset, collate_samples
from regiontower.train_stages.packed_attention import packed_attention
from regiontower.train_stages.packing import collate_packed
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import write_scenes


@pytest.fixture(scope="module")
def samples(tiny_mllm, tmp_path_factory):
    records = read_records(write_scenes(tmp_path_factory.mktemp("scenes"), 4, 0, preset="easy", progress=False))
    mix = {"classify": 1.0, "grounding": 1.0}
    dataset = ConversationDataset(records, tiny_mllm[1], mix, turns=3, max_tokens=500, cache_dir=None)
    random.seed(0)
    return [dataset[index] for index in range(4)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("items", [None, 17])
def test_loss_and_gradients_are_the_same_with_fewer_logits(make_tiny_mllm, samples, packed, items):
    """Also where the loss is divided by the tokens of several batches."""
    model, processor = make_tiny_mllm()
    collate = collate_packed if packed else collate_samples
    batch = collate([samples] if packed else samples, processor=processor)
    rows = []
    model.lm_head.register_forward_pre_hook(lambda head, inputs: rows.append(inputs[0].shape[:-1].numel()))

    def learn(batch):
        model.zero_grad()
        with packed_attention(model.model.language_model, torch.device("cpu")):
            loss = model(**batch, use_cache=False, num_items_in_batch=items).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (loss, grads), (same_loss, same_grads) = learn(batch), learn(learned_logits(batch))
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == same_grads.keys()
    for name, gradient in grads.items():
        assert (same_grads[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name
    learned = int((batch["labels"][:, 1:] != -100).sum())
    assert learned <= rows[1] < rows[0] / 2 and (rows[1] == learned or not packed)


def test_a_batch_without_anything_learned_still_runs_the_head():
    labels = torch.full((2, 5), -100)
    labels[:, 0] = 7  # nothing comes before it
    kept = learned_logits({"labels": labels})
    assert kept["logits_to_keep"].tolist() == [0] and kept["shift_labels"].tolist() == [[-100], [-100]]
