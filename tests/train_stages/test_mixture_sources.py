"""What the sources of a mixture hold, whatever their format."""

import io
import json

import pytest
from PIL import Image
from small_mixtures import ALONE, COUNT, TALK, source, write_sources

from regiontower.train_stages.mixture import open_mixture
from regiontower.train_stages.mixture_recipe import MixtureSource
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.webdataset import write_shards
from regiontower.vision_towers import UserError

SYSTEM = [{"from": "system", "value": "Be brief."}, *ALONE]
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("mixture"))


def picture_of(root):
    record = read_records(root / "records.jsonl").records[0]
    return Image.open(root / record.image).convert("RGB")


def test_records_and_their_shards_give_the_same_samples(root):
    pytest.importorskip("webdataset")
    shards = write_shards(read_records(root / "records.jsonl"), root / "shards", per_shard=5)
    both = [
        open_mixture([source(root, "records.jsonl")], 0),
        open_mixture([MixtureSource(tuple(map(str, shards)), format="webdataset")], 0),
    ]
    assert both[0].size == both[1].size == COUNT
    for place in range(2 * COUNT):
        first, second = (mixture[place] for mixture in both)
        assert first.record.regions == second.record.regions
        assert first.picture.open().tobytes() == second.picture.open().tobytes()


@pytest.mark.parametrize("file", ["talks.json", "talks.jsonl"])
def test_llava_conversations_are_kept_turn_by_turn(root, file):
    mixture = open_mixture([source(root, file, format="conversations")], 0)
    examples = list(mixture.everything())
    assert len(examples) == mixture.size == COUNT + 4
    assert examples[0].turns == (("What is it?", "A star."), ("Which colour?", "red"))
    assert examples[0].picture.open().tobytes() == picture_of(root).tobytes()
    assert examples[-1].picture is None and examples[-1].turns == (("Say five.", "5"),)


def test_conversations_in_shards(root, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as tar:
        png = io.BytesIO()
        picture_of(root).save(png, "png")
        talk = json.dumps({"conversations": TALK}).encode()
        tar.write({"__key__": "a", "png": png.getvalue(), "json": talk})
        tar.write({"__key__": "b", "json": json.dumps({"conversations": SYSTEM}).encode()})
        tar.write({"__key__": "c", "png": png.getvalue(), "json": b"[]"})
    mixture = open_mixture([source(tmp_path, "0.tar", format="webdataset")], 0)
    shown, alone = mixture.everything()
    assert mixture.size == 3 and shown.picture.open().tobytes() == picture_of(root).tobytes()
    assert shown.turns[1] == ("Which colour?", "red") and alone.system == "Be brief."


@pytest.mark.parametrize("kind", ["parquet", "streamed", "folder", "streamed folder"])
def test_data_sets_of_hugging_face(root, tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    picture = picture_of(root)
    rows = {"image": [picture, None], "conversations": [TALK, ALONE]}
    folder, streamed = "folder" in kind, "streamed" in kind
    options = {"stream": True, "weight": 1.0} if streamed else {}
    if folder:
        rows = {
            "images": [[picture], []],
            "messages": [MESSAGES, [{"role": m["role"], "content": [m["content"][-1]]} for m in MESSAGES]],
        }
    features = None
    if folder:
        part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
        message = {"role": datasets.Value("string"), "content": datasets.List(part)}
        features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(message)})
    else:
        turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
        features = datasets.Features({"image": datasets.Image(), "conversations": datasets.List(turn)})
    made = datasets.Dataset.from_dict(rows, features=features)
    if folder:
        made.save_to_disk(str(tmp_path / "set"))
        mixture = open_mixture([source(tmp_path, "set", format="datasets", **options)], 0)
    else:
        made.to_parquet(str(tmp_path / "set.parquet"))
        mixture = open_mixture([source(tmp_path, "set.parquet", format="datasets", **options)], 0)
    found = sorted((mixture[place] for place in range(2)), key=lambda example: example.picture is None)
    assert found[0].turns[0] == ("What is it?", "A star.")
    assert found[0].picture.open().tobytes() == picture.tobytes()
    assert found[1].picture is None
    assert mixture.endless == streamed


def test_streamed_records_and_their_place(root):
    pytest.importorskip("datasets")
    options = {"stream": True, "weight": 1.0, "buffer": 4}
    one, two = (open_mixture([source(root, "records.jsonl", **options)], 3) for _ in range(2))
    names = [one[place].name for place in range(2 * COUNT)]
    assert sorted(names[:COUNT]) == sorted(names[COUNT:]) and len(set(names)) == COUNT
    assert two[2 * COUNT - 1].name == names[-1]  # taken up there
    assert two[3].name == names[3]  # and back
    with pytest.raises(ValueError, match="give it, and all others, a weight"):
        source(root, "records.jsonl", stream=True)


def test_what_cannot_be_read_is_one_sentence(root, tmp_path):
    for fields, said in (
        ({"records": str(tmp_path / "absent.jsonl")}, "cannot be read"),
        ({"records": str(tmp_path / "absent.json"), "format": "conversations"}, "cannot be read"),
        ({"records": str(tmp_path / "absent.tar"), "format": "webdataset"}, "cannot be read"),
        ({"records": str(tmp_path / "absent.tar.gz"), "format": "webdataset"}, "set stream: true"),
        ({"records": str(root / "records.jsonl"), "format": "record"}, "did you mean 'records'"),
        ({"records": str(root / "records.jsonl"), "mix": {"grnding": 1}}, "unknown kinds"),
    ):
        with pytest.raises(UserError, match=said) as error:
            open_mixture([MixtureSource(**fields)], 0)
        assert "\n" not in str(error.value)
