"""Four small pictures in a folder with a space, and a model whose answers are known."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # `suite_rows`, for the tests that share it

SIZE = (100, 80)
RED = [10.0, 10.0, 50.0, 40.0]  # [100, 125, 500, 500] in thousandths
BLUE = [60.0, 20.0, 90.0, 70.0]  # [600, 250, 900, 875]
GRID = " ".join(f"[{x}, {y}, {x + 100}, {y + 100}]" for x in range(0, 900, 180) for y in range(0, 900, 180))


def write_records(folder: Path, *, images: int = 4, with_ocr: bool = True) -> Path:
    """`images` pictures told apart by their gray; each with a red box, a blue box and a phrase true of both."""
    pictures = folder / "my pictures"
    pictures.mkdir(parents=True)
    lines = []
    for number in range(images):
        name = f"my pictures/photo {number}.png"
        Image.new("RGB", SIZE, (number, number, number)).save(folder / name)
        blue = {"box_xyxy": BLUE, "texts": ["the blue box", "a thing"]}
        if with_ocr and number < 3:
            blue["ocr"] = "Hello World"
        red = {"box_xyxy": RED, "texts": ["the red box", "the left one", "a thing"]}
        record = {"image": name, "width": SIZE[0], "height": SIZE[1], "regions": [red, blue]}
        record["absent"] = ["a cow"]
        lines.append(json.dumps(record))
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# question -> the answer for pictures 0, 1, 2, 3
ANSWERS = {
    "Where is the red box?": ["[100, 125, 500, 500]"] * 4,
    "Where is the left one?": ["It is at [100, 125, 500, 500]."] * 4,
    "Where is the blue box?": [
        f"[600, 250, 900, 875] {GRID}",  # the first of 26 boxes is right
        "none",
        "[600, 250",
        "[600, 250, 750, 875]",  # the left half: IoU 0.5
    ],
    "Where is a cow?": ["none", "None.", "[0, 0, 10, 10]", "[0, 0"],
    ("What is in <region>?", "red"): ["The  RED box.", "the left one", "a thing", "the blue box"],
    ("What is in <region>?", "blue"): ["the blue box", "THE BLUE BOX", "blue box", ""],
    ("Read <region>.", "blue"): ["hello  world", "Hello", "Hello World."],
}


class KnownModel(torch.nn.Module):
    """Weights that only the fingerprint looks at."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))


class KnownAnswers:
    """Stands where `mllm.answer_questions` does. Remembers what was asked; raises once `fail_after` were answered."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[tuple] = []
        self.batches: list[int] = []
        self.max_new_tokens: set[int] = set()
        self.fail_after = fail_after

    def __call__(self, model, processor, questions, max_new_tokens=48, batch_size=16):
        from regiontower.mllm import Answer
        from regiontower.mllm.boxes import ImageFrame, box_format

        self.batches.append(len(questions))
        self.max_new_tokens.add(max_new_tokens)
        answers, asked = [], []
        for question in questions:
            if self.fail_after is not None and len(self.asked) + len(questions) > self.fail_after:
                raise RuntimeError("the power went out")
            number = question.image.getpixel((0, 0))[0]
            boxes = [list(map(float, box)) for box in question.boxes]
            assert len(boxes) == question.text.count("<region>")
            which = {str(RED): "red", str(BLUE): "blue"}
            key = (question.text, which[str(boxes[0])]) if boxes else question.text
            text = ANSWERS[key][number]
            answers.append(Answer(text, box_format(processor.box_format).parse(text, ImageFrame.identity(SIZE))))
            asked.append((number, question.text, str(boxes)))
        self.asked += asked
        return answers


@pytest.fixture
def records_path(tmp_path) -> Path:
    return write_records(tmp_path / "some data")


@pytest.fixture
def make_records():
    """`write_records(folder, images=, with_ocr=)`."""
    return write_records


@pytest.fixture
def expected() -> dict[str, dict]:
    """The figures that `ANSWERS` must get on `records_path`."""
    return {
        "regiontower_grounding": {"n": 12, "acc50": 10 / 12, "miou": 9.5 / 12, "parse_rate": 10 / 12},
        "regiontower_referring": {"n": 8, "em": 4 / 8},
        "regiontower_reading": {"n": 3, "em": 1 / 3},
        "regiontower_absent": {"n": 4, "rejection": 2 / 4},
    }


@pytest.fixture
def make_chat():
    """A `RegionTowerChat` with known answers, and the list of what it was asked."""

    def make(*, fail_after: int | None = None, weight: float = 1.0, answer=None, box_format="int1000", **options):
        from regiontower.eval.lmms_model import RegionTowerChat

        known = answer or KnownAnswers(fail_after)
        processor = SimpleNamespace(box_format=box_format)
        chat = RegionTowerChat.from_module(KnownModel(weight), processor, answer=known, progress=False, **options)
        return chat, known

    return make


@pytest.fixture
def isolated_cache(tmp_path, monkeypatch) -> Path:
    """No test writes into the user's cache or reads an old run's."""
    cache = tmp_path / "the cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture(scope="module")
def data_root(tmp_path_factory, noise_image) -> Path:
    """A data root with four rows for every built-in task of the suites."""
    from suite_rows import write_hub

    return write_hub(tmp_path_factory.mktemp("data root"), noise_image)


class OneAnswer:
    """Vocabulary and weights of a language model that makes one answer to everything: each token is followed by a
    fixed one.

    words: the answer, behind the last word of every prompt. specials: further tokens of the model's processor.
    """

    def __init__(self, words: list[str], specials: list[str]):
        self.chain = ["ASSISTANT:", *words, "</s>"]
        self.vocabulary = ["<pad>", "<unk>", "USER:", *specials, *self.chain]
        self.vocabulary += [f"filler{i}" for i in range(-len(self.vocabulary) % 16)]  # heads divide the width
        self.specials = specials

    def tokenizer(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(self.vocabulary)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        marks = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
        return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=self.specials, **marks)

    def template(self, image: str) -> str:
        """A chat template; image: what stands for a picture."""
        return (
            "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + image + " ' }}"
            "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
        )

    def text(self) -> dict:
        """Fields of a text configuration."""
        width, end = len(self.vocabulary), self.vocabulary.index("</s>")
        sizes = {"vocab_size": width, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        return {**sizes, **heads, "eos_token_id": end, "pad_token_id": 0, "bos_token_id": None}

    def teach(self, model) -> None:
        """Let what stands before a token alone say what follows it."""
        width = len(self.vocabulary)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "language_model" in name and ("o_proj" in name or "down_proj" in name):
                    weight.zero_()
            model.get_input_embeddings().weight.copy_(torch.eye(width))
            head = torch.zeros(width, width)
            for word, following in itertools.pairwise(self.chain):
                head[self.vocabulary.index(following), self.vocabulary.index(word)] = 10.0
            model.lm_head.weight.copy_(head)


@pytest.fixture(scope="session")
def one_answer():
    """`OneAnswer`, for models of other classes."""
    return OneAnswer


@pytest.fixture(scope="session")
def square_records(tmp_path_factory):
    """`make(count, seed)`: pictures with squares of two of three colours on gray, each with its name; the second one
    says so, too."""
    from regiontower.train_stages.record_io import RecordSet
    from regiontower.train_stages.records import Record, Region

    colors = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}

    def make(count: int, seed: int):
        folder = tmp_path_factory.mktemp("squares")
        rng, records = np.random.default_rng(seed), []
        for number in range(count):
            picture, regions = Image.new("RGB", (56, 56), (90, 90, 90)), []
            for index, color in enumerate(rng.permutation(list(colors))[:2].tolist()):
                x, y = 28 * index + int(rng.integers(0, 8)), int(rng.integers(0, 36))
                box = (x, y, x + 16, y + 18)
                picture.paste(colors[color], box)
                regions.append(Region(box_xyxy=box, category="square", tags=[color], ocr=color if index else None))
            picture.save(folder / f"{number}.png")
            caption = f"a {regions[0].tags[0]} square"
            records.append(Record(image=f"{number}.png", width=56, height=56, regions=regions, captions=[caption]))
        return RecordSet(folder / "records.jsonl", folder, records)

    return make


@pytest.fixture(scope="session")
def squares(square_records):
    """The same as pixels."""
    from regiontower.train_stages.pixels import PixelCache

    return lambda count, seed: PixelCache.build(square_records(count, seed), 56, progress=False)
