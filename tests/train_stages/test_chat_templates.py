"""Label masks through the real chat templates of four families of language models."""

import copy
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from regiontower.mllm import RegionLlavaProcessor
from regiontower.mllm.answers import user_prompt
from regiontower.mllm.boxes import Boxes
from regiontower.mllm.prompts import assistant_message, user_message
from regiontower.train_stages.chat_templates import set_chat_template
from regiontower.train_stages.conversation_ids import IGNORED, conversation_ids, ends_answers
from regiontower.train_stages.conversations import RenderedTurn
from regiontower.vision_towers import UserError

TEMPLATES = Path(__file__).parent / "chat_templates"
TEXTS = ["USER: Where is the red star? ASSISTANT: a blue heart", "system user assistant answers helpful", "12 345"] * 20
BOX = (12.0, 9.0, 60.0, 45.0)
TURNS = [
    RenderedTurn("What is in <region>?", (BOX,), "a blue heart"),
    RenderedTurn("Where is the star?", (), "[12, 345, 678, 1000]"),
    RenderedTurn("Read it.", (), "none"),
]
IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# family -> (special tokens, those of begin, end and padding as the model cards have them, text that ends an answer)
FAMILIES = {
    "qwen2_5": (IM, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, "<|im_end|>"),
    "qwen3": (IM, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, "<|im_end|>"),
    "smollm2": (IM, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, "<|im_end|>"),
    "llama3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},  # and nothing to pad with
        "<|eot_id|>",
    ),
    "vicuna": ([], {}, "</s>"),
}


def byte_level(special, roles, writes_bos):
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    if writes_bos:  # as Llama 3's tokenizer does, although its template does, too
        bos = roles["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=special, **roles)


def vicuna():
    """Llama 2's kind of tokenizer: a space before the first word, none elsewhere; no token ends "ASSISTANT:"."""
    backend = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [chr(code) for code in range(33, 127)]
    backend.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(backend.to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tiny_mllm):
    name = request.param
    special, roles, end = FAMILIES[name]
    tokenizer = vicuna() if name == "vicuna" else byte_level(special, roles, writes_bos=name == "llama3")
    set_chat_template(tokenizer, "vicuna" if name == "vicuna" else str(TEMPLATES / f"{name}.jinja"), name)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<region>"]}, replace_extra_special_tokens=False)
    images = copy.deepcopy(tiny_mllm[1].image_processor)
    sizes = {"patch_size": 8, "image_size": 64}
    return RegionLlavaProcessor(images, tokenizer, **sizes, chat_template=tokenizer.chat_template), end


def encode(processor, turns=TURNS, **options):
    return conversation_ids(processor, turns, processor.frame((120, 90)), 2000, **options)[:2]


def test_complaint_10_answers_and_the_token_that_ends_them_are_learned_and_nothing_else(family):
    """LLaVA #1166, #375, #779: "tokenization mismatch", and a loss of 0 because every label was masked."""
    processor, end = family
    ids, labels = encode(processor)
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
    runs, before = [], IGNORED
    for label in labels:
        if label != IGNORED:
            runs = [*runs, []] if before == IGNORED else runs
            runs[-1].append(label)
        before = label
    assert [processor.tokenizer.decode(run).strip() for run in runs] == [turn.answer + end for turn in TURNS]
    assert ends_answers(processor)


def test_ids_are_those_of_the_whole_text_with_one_beginning(family):
    processor, _ = family
    ids, _ = encode(processor, TURNS[:1])
    messages = [user_message(TURNS[0].question, with_image=True), assistant_message(TURNS[0].answer)]
    frame = processor.frame((120, 90))
    text = processor.write(processor.apply_chat_template(messages), frame, Boxes([BOX]))
    if "<think>" in text:  # Qwen3 thinks before the last answer of a conversation; we learn to answer at once
        text = text.replace("<think>\n\n</think>\n\n", "")
    bos = processor.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    assert ids == processor.tokenizer(text, add_special_tokens=special)["input_ids"]
    if bos is not None:
        assert ids[0] == processor.tokenizer.bos_token_id != ids[1]


def test_what_is_asked_in_training_is_what_is_asked_later(family, noise_image):
    """The ids before the first answer are those that a question is answered from."""
    processor, _ = family
    ids, labels = encode(processor)
    first = next(n for n, label in enumerate(labels) if label != IGNORED)
    prompt = user_prompt(processor, TURNS[0].question)
    asked = processor(noise_image(120, 90), prompt, boxes=[[BOX]])["input_ids"][0].tolist()
    assert ids[:first] == asked


def test_a_system_message_takes_the_place_of_the_templates_own(family):
    processor, _ = family
    with_own = processor.tokenizer.decode(encode(processor)[0])
    given = processor.tokenizer.decode(encode(processor, system="Be brief.")[0])
    assert "Be brief." in given and "helpful" not in given
    assert given.count("a blue heart") == with_own.count("a blue heart") == 1


def test_text_alone_holds_no_picture(family):
    processor, _ = family
    ids, labels = encode(processor, TURNS[1:], with_image=False)
    assert processor.image_token_id not in ids and any(label != IGNORED for label in labels)


def test_a_template_that_ends_nothing_is_noticed(family):
    processor = copy.deepcopy(family[0])
    processor.chat_template = (  # as of llava-1.5-7b-hf
        "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    assert not ends_answers(processor)


def test_a_tokenizer_without_a_template_needs_one():
    tokenizer = vicuna()
    with pytest.raises(UserError, match=r"has no chat template; set model\.chat_template to vicuna"):
        set_chat_template(tokenizer, None, "lmsys/vicuna-7b-v1.5")
    with pytest.raises(UserError, match="neither vicuna nor a file"):
        set_chat_template(tokenizer, "vicunna", "lmsys/vicuna-7b-v1.5")
