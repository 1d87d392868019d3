"""A text tower that learns to name the regions of a frozen tower."""

from dataclasses import replace

import pytest
import torch

from regiontower.eval.probe.labels import object_labels, word_labels, words_of
from regiontower.eval.probe.lit import LitConfig, lit_texts
from regiontower.eval.probe.regions import ProbeRegions, labelled_regions, reader
from regiontower.eval.probe.zero_shot import region_retrieval, zero_shot_classes
from regiontower.train_stages.clip_objective import ClipConfig
from regiontower.train_stages.region_labels import ObjectClasses
from regiontower.vision_towers import UserError

SMALL = LitConfig(60, text=ClipConfig(embed_dim=24, text_hidden=32, text_layers=1, text_heads=2, max_tokens=16))


@pytest.fixture(scope="module")
def known(rice_tower, squares):
    """Regions by their words, of images that no test asks about, and the words."""
    cache = squares(60, 5)
    words = words_of(cache.records)
    return labelled_regions(reader(rice_tower, "crops"), cache, word_labels(words)), words


def test_it_learns_to_name_colours_of_a_tower_that_stays(rice_tower, tiny_tokenizer, known, squares):
    before = {name: value.clone() for name, value in rice_tower.state_dict().items()}
    texts = lit_texts(*known, tiny_tokenizer, "crops", SMALL)
    assert all(torch.equal(value, before[name]) for name, value in rice_tower.state_dict().items())
    asked, names = squares(24, 6), ["blue square", "green square", "red square"]
    labels = object_labels(ObjectClasses(names, "tags", stuff=True))
    objects = labelled_regions(reader(rice_tower, "crops"), asked, labels)
    assert zero_shot_classes(objects, names, texts, "crops").value > 0.9  # chance: a third
    found = region_retrieval(reader(rice_tower, "crops"), asked, texts, "crops")
    assert found["text_to_region_r5"].value > 0.8
    untrained = lit_texts(*known, tiny_tokenizer, "crops", replace(SMALL, steps=1))
    assert zero_shot_classes(objects, names, untrained, "crops").value < 0.7


def test_the_same_seed_gives_the_same_texts(tiny_tokenizer, known):
    config = replace(SMALL, steps=3)
    state = torch.random.get_rng_state()
    first = lit_texts(*known, tiny_tokenizer, "own", config)
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's draws are moved
    again = lit_texts(*known, tiny_tokenizer, "own", config)
    other = lit_texts(*known, tiny_tokenizer, "own", replace(config, seed=1))
    asked, rows = ["red square", "a much longer text"], torch.from_numpy(known[0].features[:4])
    assert torch.equal(first.texts(asked), again.texts(asked)) and set(first.regions) == {"own"}
    assert torch.equal(first.regions["own"](rows), again.regions["own"](rows))
    assert not torch.equal(first.texts(asked), other.texts(asked))


def test_what_cannot_be_learned_is_one_sentence(tiny_tokenizer, known):
    regions, words = known
    one = ProbeRegions(regions.features[:3], regions.classes[:3] * 0, regions.images[:3])
    with pytest.raises(UserError, match="two different words"):
        lit_texts(one, words, tiny_tokenizer, "own", SMALL)
    with pytest.raises(UserError, match="give 1 or more"):
        LitConfig(0)
