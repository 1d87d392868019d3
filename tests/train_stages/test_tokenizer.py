"""The tokenizer keeps every text, agrees with sentencepiece, and opens in plain transformers."""

import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig

from regiontower.mllm import prompts
from regiontower.mllm.boxes import BOX_FORMATS, Boxes, ImageFrame, box_format
from regiontower.train_stages.tokenizer import (
    ASSISTANT_TOKEN,
    END_TOKEN,
    MARKERS,
    SENTENCEPIECE_FILE,
    SPECIAL_TOKENS,
    USER_TOKEN,
    train_tokenizer,
)
from regiontower.vision_towers.errors import UserError

COLORS = ("red", "yellow", "green", "blue")
THINGS = ("star", "heart", "check mark", "sign", "music note", "umbrella")
WORDS = ("apple", "banana", "NURSE", "Coffee", "GST REG.:002120876032", "total 31.45")
QUESTIONS = (prompts.LOCATE, prompts.REFER, prompts.READ, prompts.DESCRIBE_REGION, prompts.COUNT, prompts.COMPARE_SIZE)


def corpus(count: int = 3000) -> list[str]:
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        phrase = f"{rng.choice(COLORS)} {rng.choice(THINGS)} left of the {rng.choice(THINGS)}"
        x, y = rng.randrange(900), rng.randrange(900)
        box = f"[{x}, {y}, {rng.randrange(x, 1001)}, {rng.randrange(y, 1001)}]"
        question = rng.choice(QUESTIONS).format(phrase=phrase, noun=rng.choice(THINGS))
        texts += [phrase, box, question, f'sign "{rng.choice(WORDS)}"', rng.choice(WORDS), f"{box} {phrase}"]
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus(), folder, vocab_size=700)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_sentencepiece(folder, tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))
    assert len(tokenizer) == pieces.get_piece_size()
    texts = [*dict.fromkeys(corpus()), "Grüße, 東京 <0x41> 7", "  two  spaces ", "Read <region>.<|end|>"]
    assert len(texts) > 4000
    assert [tokenizer.encode(text) for text in texts] == [pieces.encode(text) for text in texts]


def test_texts_come_back_and_words_are_pieces(tokenizer):
    for text in dict.fromkeys(corpus()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the umbrella")) < len("the umbrella") / 2


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_any_text_comes_back(tokenizer, text):
    if not any(marker in text for marker in SPECIAL_TOKENS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_box_strings_come_back_digit_by_digit(tokenizer, data):
    width, height = data.draw(st.tuples(st.integers(1, 4000), st.integers(1, 4000)))
    x1, x2 = sorted(data.draw(st.tuples(st.floats(0, width), st.floats(0, width))))
    y1, y2 = sorted(data.draw(st.tuples(st.floats(0, height), st.floats(0, height))))
    frame = ImageFrame.letterbox((width, height), 224)
    text = box_format(data.draw(st.sampled_from(BOX_FORMATS))).write(Boxes([(x1, y1, x2, y2)]), frame)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    for piece in tokenizer.convert_ids_to_tokens(ids):
        assert len(piece) == 1 or not set(piece) & set(string.digits)


def test_special_tokens_are_single_ids(tokenizer):
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(f"a{token}b")[1:-1] == [tokenizer.convert_tokens_to_ids(token)]
    assert len({tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}) == len(SPECIAL_TOKENS)
    text = f"{USER_TOKEN}Read <region>.{END_TOKEN}"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "Read ."
    assert set(MARKERS) <= set(tokenizer.all_special_tokens)
    assert (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token) == ("<pad>", "<unk>", "</s>")
    assert tokenizer.encode("a", add_special_tokens=True) == tokenizer.encode("a", add_special_tokens=False)


def test_chat_template_and_assistant_mask(tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Where is é?"}, {"type": "image"}]},
        {"role": "assistant", "content": "[1, 2] ü 東"},
        {"role": "user", "content": "And the star?"},
        {"role": "assistant", "content": [{"type": "text", "text": "none"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        f"{USER_TOKEN}<image>Where is é?{END_TOKEN}{ASSISTANT_TOKEN}[1, 2] ü 東{END_TOKEN}"
        f"{USER_TOKEN}And the star?{END_TOKEN}{ASSISTANT_TOKEN}none{END_TOKEN}"
    )
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == tokenizer.encode(text)
    learned = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learned) == f"[1, 2] ü 東{END_TOKEN}none{END_TOKEN}"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith(ASSISTANT_TOKEN)
    with pytest.raises(Exception, match="'system'"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_plain_transformers_opens_it(tokenizer, tmp_path):
    """Alone, and beside a Llama: AutoTokenizer must not take the tokenizer class of the model type instead."""
    folders = [str(tmp_path / name) for name in ("alone", "llama")]
    for folder in folders:
        tokenizer.save_pretrained(folder)
    LlamaConfig().save_pretrained(folders[1])
    text = '[12, 345, 678, 1000] red star<|end|> sign "Grüße"'
    code = (
        "import sys; sys.modules['regiontower'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"for folder in {folders!r}:\n"
        "    tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"    print(tokenizer.encode({text!r}), tokenizer.decode(tokenizer.encode({text!r})) == {text!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.splitlines() == [f"{tokenizer.encode(text)} True"] * 2


def test_same_texts_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        train_tokenizer(iter(corpus(300)), tmp_path / name, vocab_size=600)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", "  "], tmp_path)
    with pytest.raises(UserError, match="vocab_size=100"):
        train_tokenizer(corpus(10), tmp_path, vocab_size=100)


def test_training_prints_nothing(tmp_path, capfd):
    train_tokenizer(corpus(50), tmp_path, vocab_size=500)
    assert capfd.readouterr() == ("", "")
