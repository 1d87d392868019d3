"""Heads, losses and merging, each against its formula."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regiontower.eval.segmentation import PanopticMap, Segmenter, SegmenterConfig
from regiontower.eval.segmentation.label_maps import VOID
from regiontower.eval.segmentation.merging import merged
from regiontower.eval.segmentation.panoptic_head import PanopticHead, Proposals
from regiontower.eval.segmentation.panoptic_loss import Targets, mask_bce, mask_dice, match, panoptic_loss
from regiontower.eval.segmentation.segmenter import at_pixels
from regiontower.eval.segmentation.semantic_head import SemanticHead, semantic_loss
from regiontower.mllm.boxes import ImageFrame
from regiontower.vision_towers import UserError


@pytest.fixture
def given():
    """Dense features, the same in the space of texts, pixels, and texts."""
    draw = torch.Generator().manual_seed(0)
    dense, embeds = torch.randn(2, 8, 3, 4, generator=draw), torch.randn(2, 6, 3, 4, generator=draw)
    texts = F.normalize(torch.randn(5, 6, generator=draw), dim=1)
    return dense, embeds, torch.randn(2, 3, 42, 56, generator=draw), texts


def test_untrained_it_compares_patches_and_texts(given):
    torch.manual_seed(1)
    head = SemanticHead(8, 6, 16)
    logits = head(*given)
    assert logits.shape == (2, 5, 12, 16)
    _, embeds, _, texts = given
    patches = F.normalize(embeds, dim=1)
    finer = F.interpolate(patches, (12, 16), mode="bilinear")
    cosines = torch.einsum("bjyx,cj->bcyx", F.normalize(finer, dim=1), texts)
    torch.testing.assert_close(logits, cosines / 0.07)
    # A place in a corner lies inside one patch: it is that patch.
    torch.testing.assert_close(logits[:, :, 0, 0], patches[:, :, 0, 0] @ texts.T / 0.07)
    torch.nn.init.normal_(head.residual.weight)
    assert not torch.allclose(head(*given), logits)


def test_the_decoder_sees_the_pixels(given):
    head = SemanticHead(8, 6, 16)
    torch.nn.init.normal_(head.residual.weight)
    dense, embeds, pixels, texts = given
    other = pixels.clone()
    other[:, :, :14, :14] = 0
    moved = (head(dense, embeds, other, texts) - head(*given)).abs().amax((0, 1))
    assert moved[:4, :4].min() > 0 and moved[8:, 8:].max() == 0


def test_void_pixels_teach_nothing():
    logits = torch.randn(2, 3, 2, 2, requires_grad=True, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([[[0, VOID], [2, VOID]], [[VOID, VOID], [1, 1]]])
    loss = semantic_loss(logits, truth)
    known = [(b, y, x) for b, y, x in itertools.product(range(2), range(2), range(2)) if truth[b, y, x] != VOID]
    each = [-logits[b, :, y, x].log_softmax(0)[truth[b, y, x]] for b, y, x in known]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    loss.backward()
    assert not logits.grad.permute(0, 2, 3, 1)[truth == VOID].any()
    assert semantic_loss(logits, torch.full_like(truth, VOID)) == 0


def test_a_mask_is_named_by_the_patches_under_it(given):
    torch.manual_seed(1)
    head = PanopticHead(8, 6, 16, queries=7)
    found = head(*given)
    assert found.masks.shape == (2, 7, 12, 16) and found.classes.shape == (2, 7, 6)
    _, embeds, _, texts = given
    finer = F.interpolate(F.normalize(embeds, dim=1), (12, 16), mode="bilinear")
    for image, query in itertools.product(range(2), range(7)):
        share = found.masks[image, query].sigmoid()
        under = (share * finer[image]).sum((1, 2)) / share.sum()
        torch.testing.assert_close(found.classes[image, query, :5], texts @ F.normalize(under, dim=0) / 0.07)


def slow_mask_costs(logits, mask, labelled):
    """BCE and dice of one mask, pixel by pixel, over those that are labelled."""
    bce = shared = inside = own = count = 0.0
    for logit, wanted, known in zip(logits.tolist(), mask.tolist(), labelled.tolist(), strict=True):
        if known:
            share = 1 / (1 + math.exp(-logit))
            bce -= math.log(share if wanted else 1 - share)
            shared, inside, own, count = shared + share * wanted, inside + share, own + wanted, count + 1
    return bce / count, 1 - (2 * shared + 1) / (inside + own + 1)


@pytest.fixture
def proposals():
    """Four proposals and two true segments on 3 x 4 places, of which some are void."""
    draw = torch.Generator().manual_seed(3)
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [VOID, VOID, VOID, 2]])
    target = Targets.of(PanopticMap(truth, (1, 0, 1), (False, False, True)), torch.device("cpu"))
    return torch.randn(4, 12, generator=draw), torch.randn(4, 4, generator=draw), target


def test_crowds_and_void_are_no_targets(proposals):
    target = proposals[2]
    assert target.classes.tolist() == [1, 0] and target.labelled.tolist() == [1.0] * 8 + [0.0] * 4
    assert target.masks.sum(1).tolist() == [4, 4]


def test_losses_of_masks_are_their_formulas(proposals):
    masks, _, target = proposals
    bce, dice = (cost(masks, target.masks, target.labelled) for cost in (mask_bce, mask_dice))
    for q, g in itertools.product(range(4), range(2)):
        expected = slow_mask_costs(masks[q], target.masks[g], target.labelled)
        assert (bce[q, g].item(), dice[q, g].item()) == pytest.approx(expected, rel=1e-5)


def test_the_match_is_the_cheapest_and_the_loss_its_sum(proposals):
    masks, classes, target = proposals
    rows, columns = match(masks, classes, target)

    def cost(pairs):
        total = 0.0
        for q, g in pairs:
            bce, dice = slow_mask_costs(masks[q], target.masks[g], target.labelled)
            total += 5 * bce + 5 * dice - 2 * classes[q].softmax(0)[target.classes[g]].item()
        return total

    found = list(zip(rows.tolist(), columns.tolist(), strict=True))
    every = [list(zip(chosen, range(2), strict=True)) for chosen in itertools.permutations(range(4), 2)]
    assert cost(found) == pytest.approx(min(map(cost, every)), rel=1e-5)

    loss = panoptic_loss(Proposals(masks.unflatten(1, (3, 4))[None], classes[None]), [target])
    wanted = dict(found)
    weights = [1.0 if q in wanted else 0.1 for q in range(4)]
    labels = [target.classes[wanted[q]] if q in wanted else 3 for q in range(4)]
    named = sum(-w * classes[q].log_softmax(0)[labels[q]].item() for q, w in enumerate(weights)) / sum(weights)
    shaped = [slow_mask_costs(masks[q], target.masks[g], target.labelled) for q, g in found]
    assert loss.item() == pytest.approx(2 * named + sum(5 * bce + 5 * dice for bce, dice in shaped) / 2, rel=1e-5)


def test_an_image_without_segments_has_a_loss(proposals):
    masks, classes, _ = proposals
    empty = Targets.of(PanopticMap(np.full((3, 4), VOID), (), ()), torch.device("cpu"))
    loss = panoptic_loss(Proposals(masks.unflatten(1, (3, 4))[None], classes[None]), [empty])
    torch.testing.assert_close(loss, 2 * -classes.log_softmax(-1)[:, 3].mean())


def test_segments_do_not_overlap():
    """Six proposals on a row of eight pixels; class 2 is stuff, 3 is no object."""

    def row(text, inside=4.0):
        return [inside if letter == "x" else -4.0 for letter in text]

    def sure(label, score):
        rest = (1 - score) / 3
        return [math.log(score if number == label else rest) for number in range(4)]

    given = [
        (row("xxxx...."), sure(0, 0.9)),
        (row("..xxxx.."), sure(0, 0.8)),  # the first one takes half of it
        (row("......x."), sure(2, 0.9)),
        (row(".......x"), sure(2, 0.7)),  # the same stuff
        (row("xxxxxxxx"), sure(3, 0.95)),  # nothing
        (row("....xx.."), sure(1, 0.4)),  # not sure
    ]
    masks, classes = torch.tensor([mask for mask, _ in given])[:, None], torch.tensor([named for _, named in given])
    stuff = (False, False, True)
    found = merged(masks, classes, stuff, 0.5, 0.8)
    assert found.segment.tolist() == [[0, 0, 0, 0, VOID, VOID, 1, 1]] and found.classes == (0, 2)
    loose = merged(masks, classes, stuff, 0.5, 0.5)
    assert loose.segment.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2]] and loose.classes == (0, 0, 2)
    none = merged(masks, classes, stuff, 0.99, 0.8, lambda few: F.interpolate(few[None], (2, 16))[0])
    assert none.classes == () and none.segment.shape == (2, 16) and (none.segment == VOID).all()


@pytest.mark.parametrize("size", [(30, 20), (7, 9)])
def test_answers_are_in_pixels_of_the_original(size):
    """A ramp over the original, letterboxed, comes back as the ramp."""
    width, height = size
    frame = ImageFrame.letterbox(size, 64)
    x = (torch.arange(64) + 0.5 - frame.offset[0]) / frame.scale[0]
    y = (torch.arange(64) + 0.5 - frame.offset[1]) / frame.scale[1]
    grid = torch.stack([x.expand(64, 64), y[:, None].expand(64, 64)])
    found = at_pixels(grid, frame, slice(0, height))
    torch.testing.assert_close(found[0], (torch.arange(width) + 0.5).expand(height, width), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], (torch.arange(height) + 0.5)[:, None].expand(height, width), atol=1e-4, rtol=0)
    assert torch.equal(at_pixels(grid, frame, slice(2, 5)), found[:, 2:5])


def test_bands_of_an_image_are_the_image(open_space, monkeypatch):
    """A large image is answered some rows at a time."""
    from regiontower.eval.segmentation import segmenter

    torch.manual_seed(0)
    model = Segmenter(open_space(), SegmenterConfig("semantic", width=8)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 56, 56), dtype=np.uint8)
    texts, frame = F.normalize(torch.randn(4, 24), dim=1), ImageFrame.letterbox((50, 31), 56)
    whole = model.segments(pixels, frame, texts, (False,) * 4)
    assert whole.segment.shape == (31, 50) and len(whole.classes) > 1
    monkeypatch.setattr(segmenter, "CELLS", 1000)
    assert np.array_equal(model.segments(pixels, frame, texts, (False,) * 4).semantic, whole.semantic)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task": "instance"}, "task must be one of semantic, panoptic"),
        ({"tuning": "full"}, "tuning must be one of none, convpass, lora"),
        ({"width": 30}, "multiple of 4"),
        ({"queries": 0}, "at least 1"),
    ],
)
def test_what_no_segmenter_is(fields, named):
    with pytest.raises(UserError, match=named):
        SegmenterConfig(**{"task": "semantic", **fields})
