"""The two objectives of stage 0 against slow twins."""

import pytest
import torch

from regiontower.train_stages.clip_objective import ClipConfig, ClipObjective
from regiontower.train_stages.cluster_loss import ClusterLossConfig, cluster_discrimination_loss
from regiontower.train_stages.rice_objective import RiceConfig, RiceObjective
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel, describe_tower, encode_regions
from regiontower.vision_towers.errors import UserError

ALL = ClusterLossConfig(sample_rate=1.0)


def tower():
    torch.manual_seed(0)
    return RiceVisionModel(
        RiceVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            patch_size=14,
            image_size=56,
            num_region_layers=1,
        )
    )


def batch():
    torch.manual_seed(1)
    corner = torch.rand(2, 3, 2) * 30
    return {
        "pixel_values": torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8),
        "boxes": torch.cat([corner, corner + 20], dim=-1),
        "region_counts": torch.tensor([3, 2]),
        "object_labels": torch.tensor([[0, -1, 4], [2, 2, -1]]),
        "ocr_labels": torch.tensor([[[-1, -1], [1, 5], [3, -1]], [[-1, -1]] * 3]),
    }


def test_rice_is_the_weighted_sum_over_labelled_regions():
    config = RiceConfig(object_weight=0.5, ocr_weight=2.0, loss=ALL)
    objective = RiceObjective(tower(), 6, 8, config)
    inputs = batch()
    out = objective(**inputs)

    spec = describe_tower(objective.tower.config)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.image_mean, spec.image_std))
    pixels = (inputs["pixel_values"] / 255 - mean) / std
    first, second = encode_regions(objective.tower, pixels, [inputs["boxes"][0], inputs["boxes"][1, :2]])

    def part(embeds, centres, rows):
        width = max(map(len, rows))
        ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
        return cluster_discrimination_loss(embeds, centres, ids, ids >= 0, ALL).loss

    objects = part(torch.stack([first[0], first[2], *second]), objective.object_centres, [[0], [4], [2], [2]])
    assert objective.ocr_centres is not None
    texts = part(first[1:], objective.ocr_centres, [[1, 5], [3]])
    torch.testing.assert_close(out.loss, 0.5 * objects + 2.0 * texts)
    torch.testing.assert_close(out.metrics["object_loss"], objects.detach())
    torch.testing.assert_close(out.metrics["ocr_loss"], texts.detach())
    torch.testing.assert_close(objective(**{**inputs, "pixel_values": pixels}).loss, out.loss)


def test_rice_trains_every_parameter():
    objective = RiceObjective(tower(), 6, 8, RiceConfig(loss=ALL))
    objective(**batch()).loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
    assert objective.object_centres.grad.any()


def test_the_ocr_form_reaches_text_alone():
    inputs = batch()
    losses = []
    for form in ("decoupled", "mean_softmax"):
        torch.manual_seed(3)
        objective = RiceObjective(tower(), 6, 8, RiceConfig(loss=ClusterLossConfig(sample_rate=1.0, ocr_form=form)))
        losses.append(objective(**inputs).metrics)
    assert losses[0]["object_loss"] == losses[1]["object_loss"]
    assert losses[0]["ocr_loss"] != losses[1]["ocr_loss"]


def test_frozen_text_centres_are_saved_but_not_trained():
    objective = RiceObjective(tower(), 6, 8, RiceConfig(ocr_centres="frozen"))
    assert "ocr_centres" in objective.state_dict()
    assert "ocr_centres" not in dict(objective.named_parameters())


@pytest.mark.parametrize("num_ocr", [0, 8])
def test_a_batch_without_text_or_labels_still_has_a_loss(num_ocr):
    objective = RiceObjective(tower(), 6, num_ocr, RiceConfig(loss=ALL))
    inputs = batch()
    inputs["ocr_labels"] = torch.full((2, 3, 1), -1)
    out = objective(**inputs)
    assert set(out.metrics) == {"object_loss", "object_top1"}
    inputs["object_labels"] = torch.full((2, 3), -1)
    nothing = objective(**inputs)
    assert nothing.loss == 0
    nothing.loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in objective.parameters())


def test_a_tower_without_regions_is_refused():
    with pytest.raises(UserError, match="no region readout"):
        RiceObjective(tower().to_native(), 6, 8, RiceConfig())


@pytest.mark.parametrize("bad", [{"object_weight": -1.0}, {"object_weight": 0.0, "ocr_weight": 0.0}])
def test_wrong_weights_are_refused(bad):
    with pytest.raises(UserError, match="object_weight"):
        RiceConfig(**bad)


def clip_objective():
    torch.manual_seed(0)
    return ClipObjective(tower(), 20, 3, ClipConfig(embed_dim=16, text_hidden=16, text_layers=1, text_heads=2))


def test_clip_starts_at_the_usual_temperature_and_trains_every_part():
    objective = clip_objective()
    assert objective.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    ids = torch.tensor([[5, 6, 7, 3], [8, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    objective(batch()["pixel_values"], ids, mask).loss.backward()
    for name in (
        "tower.embeddings.patch_embedding.weight",
        "image_projection.weight",
        "text_projection.weight",
        "logit_scale",
    ):
        assert objective.get_parameter(name).grad.any(), name
    assert objective.text_tower.get_input_embeddings().weight.grad.any()


def test_clip_reads_the_text_at_its_end_whatever_the_padding():
    objective = clip_objective().eval()
    pixels = batch()["pixel_values"]
    narrow = objective(pixels, torch.tensor([[5, 6, 3], [8, 9, 3]]), torch.ones(2, 3, dtype=torch.long))
    ids = torch.tensor([[5, 6, 3, 0, 0], [8, 9, 3, 0, 0]])
    wide = objective(pixels, ids, (torch.arange(5) < 3).long().expand(2, -1))
    torch.testing.assert_close(narrow.loss, wide.loss)
    other = objective(pixels, torch.tensor([[5, 7, 3], [8, 9, 3]]), torch.ones(2, 3, dtype=torch.long))
    assert not torch.isclose(narrow.loss, other.loss)
