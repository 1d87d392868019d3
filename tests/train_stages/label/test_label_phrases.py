"""Noun phrases of thirty captions, beside those that a person finds, for both taggers.

`caption_chunks.json` holds the chunks by the grammar of CLOC (determiner? adjectives* nouns+) after the words of the
web are taken out. It was written before a tagger was run on it; one chunk was mended afterwards ("several people": to
Penn's treebank "several" is an adjective).
"""

import json
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest

from regiontower.train_stages.label.noun_phrases import noun_phrases
from regiontower.train_stages.label.taggers import open_tagger, resolve_tagger
from regiontower.vision_towers.errors import UserError

CAPTIONS = json.loads((Path(__file__).parent / "caption_chunks.json").read_text("utf-8"))


class OnlySets(pickle.Unpickler):
    """Python's containers and `set`, nothing that runs code."""

    def find_class(self, module, name):
        if (module, name) not in (("__builtin__", "set"), ("builtins", "set")):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return set


@pytest.fixture(scope="module")
def nltk_weights(tmp_path_factory):
    """The perceptron's data: NLTK's own where it is installed; else the weights of the tagger that NLTK's was made
    from, which the wheel textblob-aptagger ships, laid out as NLTK's data."""
    pytest.importorskip("textblob")
    import nltk

    try:
        nltk.data.find("taggers/averaged_perceptron_tagger_eng")
        yield
        return
    except LookupError:
        pass
    found = find_spec("textblob_aptagger")
    if found is None or found.origin is None:
        pytest.skip("NLTK's tagger data is not here, and textblob-aptagger, which has such weights, is not installed")
    with (Path(found.origin).parent / "trontagger-0.1.0.pickle").open("rb") as file:
        weights, tags, classes = OnlySets(file, encoding="utf-8").load()
    root = tmp_path_factory.mktemp("nltk_data")
    folder = root / "taggers" / "averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    for name, value in (("weights", weights), ("tagdict", tags), ("classes", sorted(classes))):
        (folder / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(value))
    nltk.data.path.insert(0, str(root))
    yield
    nltk.data.path.remove(str(root))


@pytest.fixture(params=["nltk", "textblob"])
def tagger(request):
    if request.param == "nltk":
        request.getfixturevalue("nltk_weights")
        return open_tagger("nltk")
    pytest.importorskip("textblob")
    return open_tagger("textblob")


def test_chunks_of_thirty_captions(tagger):
    """Precision and recall of chunks, and captions whose list is exactly the person's. Neither tagger is perfect: both
    take some verbs for nouns ("a baseball player swings") and some nouns for verbs ("leaves")."""
    assert len(CAPTIONS) == 30
    right = found = expected = exact = 0
    for caption, wanted in CAPTIONS.items():
        chunks = noun_phrases([caption], tagger)
        right += len(set(chunks) & set(wanted))
        found, expected = found + len(chunks), expected + len(wanted)
        exact += chunks == wanted
    assert right / found > 0.92 and right / expected > 0.9 and exact >= 22


def test_nltks_data_is_preferred(nltk_weights):
    assert resolve_tagger("auto") == resolve_tagger("nltk") == "nltk"
    assert open_tagger("nltk")(["the", "red", "car"]) == [("the", "DT"), ("red", "JJ"), ("car", "NN")]


def test_without_nltks_data(monkeypatch, tmp_path):
    pytest.importorskip("textblob")
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert resolve_tagger("auto") == "textblob"
    with pytest.raises(UserError, match=r"has no data here.*--tagger textblob"):
        resolve_tagger("nltk")
    with pytest.raises(UserError, match="auto, nltk or textblob"):
        resolve_tagger("spacy")


def test_phrases_of_captions():
    pytest.importorskip("textblob")
    captions = [
        "A red car is parked next to two small dogs on the green grass.",
        "The image shows a woman in a white wedding dress holding a bouquet of flowers, near an old wooden table.",
        "Stock photo of A RED CAR; there is nothing else, and none of them.",
    ]
    tagger = open_tagger("textblob")
    assert noun_phrases(captions, tagger) == [
        "a red car",
        "small dogs",
        "the green grass",
        "a woman",
        "a white wedding dress",
        "a bouquet",
        "flowers",
        "an old wooden table",
    ]
    assert noun_phrases(captions, tagger, limit=2) == ["a red car", "small dogs"]
    assert noun_phrases(["", "..."], tagger) == []


def test_the_grammar_is_the_papers():
    """With tags given by hand: an optional determiner, adjectives, nouns; nothing else ends up in a phrase."""
    pytest.importorskip("textblob")
    tags = {
        "the": "DT",
        "big": "JJ",
        "bigger": "JJR",
        "dog": "NN",
        "houses": "NNS",
        "run": "VB",
        "two": "CD",
        "it": "PRP",
    }

    def tag(words):
        return [(word, tags[word]) for word in words]

    assert noun_phrases(["the big bigger dog houses run two houses it the big run dog"], tag) == [
        "the big bigger dog houses",
        "houses",
        "dog",
    ]
