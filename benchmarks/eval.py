"""Answers per second of our lmms-eval class, beside lmms-eval's own `llava_hf`, on one plain LLaVA.

regiontower bench eval --json [--model DIR] [--images 40] [--questions 200] [--batch-size 16] [--rounds 5]

Without --model it makes a random LLaVA of fixed seed: CLIP's ViT-B/16 at 224 px, a Llama of SmolLM2-135M's shape, a
vocabulary of words, float32. Every answer is `--new-tokens` long. The pictures are PNGs that are decoded at each look,
as in a dataset; each has equally many questions, of 4 to 40 words.

Each round takes a share of the pictures; three classes answer its questions one after the other, in an order that
changes from round to round: ours in batches, ours one at a time, and `llava_hf` (one at a time is all it can). Loading
is not counted. It fails when fewer than 99 % of the answers are the same, or any is empty.
"""

import argparse
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from regiontower.benchmarks._tiny_llavas import TEMPLATE
from regiontower.train_stages.engine.manifest import machine
from regiontower.vision_towers import UserError

TASK, SPLIT = "bench", "test"
WORDS = [first + second for first in "bcdfghjklmnpqrstvwz" for second in ("a", "en", "il", "or", "us", "ash", "int")]
FULL = {
    "tower": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "text": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "heads": 3,
    "side": 224,
}
TINY = {
    "tower": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    "text": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "heads": 2,
    "side": 64,
}
ARMS = ("ours", "ours_batch1", "llava_hf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a plain LLaVA; a random one when absent")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tiny", action="store_true", help="a random LLaVA of a few thousand parameters, to try it out"
    )
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="regiontower-bench-") as work:
        model = asked.model or make_llava(Path(work) / "llava", TINY if asked.tiny else FULL)
        arms = open_arms(model, asked.batch_size)
        rows = make_rows(asked.images, asked.questions, asked.rounds)
        rounds, answers = run_rounds(arms, rows, asked.rounds, asked.new_tokens)
    options = f"--images {asked.images} --questions {asked.questions} --new-tokens {asked.new_tokens}"
    results = {
        "command": f"regiontower bench eval {options} --batch-size {asked.batch_size} --rounds {asked.rounds} --json",
        **summarise(rounds, answers),
        "questions": len(rows),
        "images": asked.images,
        "new_tokens": asked.new_tokens,
        "batch_size": asked.batch_size,
        "parameters": sum(weight.numel() for weight in arms["ours"].model.parameters()),
        "machine": machine(torch.device("cpu"), 1),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("regiontower", "torch", "transformers", "lmms-eval")},
    }
    headline = {key: results[key] for key in ("ours_over_llava_hf", "ours_batch1_over_llava_hf", "identical")}
    print(json.dumps(results, indent=2), file=sys.stderr if asked.json else sys.stdout)
    print(json.dumps(headline))
    if results["identical"] < 0.99 or results["empty"]:
        sys.exit(f"{results['identical']:.1%} of the answers are the same and {results['empty']} are empty: no result.")


def make_llava(folder: Path, size: dict[str, Any]) -> Path:
    """A random plain LLaVA on disk. Its answers depend on picture and words, and hold words alone."""
    torch.manual_seed(0)
    tokenizer, side = _tokenizer(), size["side"]
    tower = CLIPVisionConfig(**size["tower"], image_size=side, patch_size=16)
    text = LlamaConfig(
        **size["text"],
        vocab_size=len(tokenizer),
        num_key_value_heads=size["heads"],
        max_position_embeddings=4096,
        initializer_range=size["text"]["hidden_size"] ** -0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.lm_head.weight[tokenizer.all_special_ids] = 0.0  # never the largest logit: an answer has no end
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def open_arms(model: Path, batch_size: int) -> dict[str, Any]:
    """The three classes, as lmms-eval's command opens them.

    Raises:
        UserError: lmms-eval's video extra, which `llava_hf` imports, is not installed.
    """
    from lmms_eval.models import get_model

    from regiontower.eval.lmms_model import RegionTowerChat

    try:
        theirs = get_model("llava_hf")
    except ImportError as error:
        raise UserError(
            f"lmms-eval's llava_hf cannot be imported ({error}): pip install 'regiontower[bench]'"
        ) from error
    ours = RegionTowerChat.create_from_arg_string(f"pretrained={model},device=cpu", {"batch_size": str(batch_size)})
    single = RegionTowerChat.from_module(ours.model, ours.processor, batch_size=1)
    arguments = f"pretrained={model},device=cpu,device_map=cpu"
    return {
        "ours": ours,
        "ours_batch1": single,
        "llava_hf": theirs.create_from_arg_string(arguments, {"batch_size": 1}),
    }


def make_rows(images: int, questions: int, rounds: int) -> Any:
    """A `datasets.Dataset` of questions and their pictures, picture by picture.

    Raises:
        UserError: numbers that do not divide.
    """
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    if questions % images or images % rounds:
        raise UserError(f"{questions} questions must divide over {images} images, and those over {rounds} rounds")
    rng = random.Random(0)
    rows = []
    for number in range(images):
        encoded = {"bytes": _png(number), "path": None}
        for _ in range(questions // images):
            words = rng.choices(WORDS, k=rng.randint(4, 40))
            rows.append({"image": encoded, "question": " ".join(words)})
    return Dataset.from_list(rows, features=Features({"image": ImageColumn(), "question": Value("string")}))


def run_rounds(
    arms: dict[str, Any], rows: Any, rounds: int, new_tokens: int
) -> tuple[list[dict[str, float]], dict[str, list[str]]]:
    """Seconds of each arm in each round, and the answers of each arm."""
    for arm in arms.values():
        arm.task_dict[TASK] = {SPLIT: rows}
        _ask(arm, [0], new_tokens)  # the first call of anything is slow
    seconds: list[dict[str, float]] = []
    answers: dict[str, list[str]] = {name: [] for name in arms}
    share = len(rows) // rounds
    for number in range(rounds):
        order = [ARMS[(number + place) % len(ARMS)] for place in range(len(ARMS))]
        found: dict[str, float] = {}
        for name in order:
            begin = time.perf_counter()
            answers[name] += _ask(arms[name], range(number * share, (number + 1) * share), new_tokens)
            found[name] = round(time.perf_counter() - begin, 3)
        seconds.append(found)
        print(f"round {number + 1} of {rounds}: {found} seconds", file=sys.stderr, flush=True)
    return seconds, answers


def summarise(rounds: Sequence[dict[str, float]], answers: dict[str, list[str]]) -> dict[str, Any]:
    """Ratios of whole times, their spread over rounds, and how far the answers agree."""
    total = {name: sum(found[name] for found in rounds) for name in ARMS}
    count = len(answers["llava_hf"])
    same = [len({text.strip() for text in texts}) == 1 for texts in zip(*(answers[name] for name in ARMS), strict=True)]
    return {
        "ours_over_llava_hf": round(total["llava_hf"] / total["ours"], 3),
        "ours_batch1_over_llava_hf": round(total["llava_hf"] / total["ours_batch1"], 3),
        "identical": round(statistics.mean(same), 4),
        "empty": sum(not text.strip() for texts in answers.values() for text in texts),
        "different_answers": len({*answers["llava_hf"]}),
        "samples_per_second": {name: round(count / total[name], 3) for name in ARMS},
        "ratio_by_round": [round(found["llava_hf"] / found["ours"], 3) for found in rounds],
        "rounds": list(rounds),
    }


def _ask(arm: Any, doc_ids: Sequence[int], new_tokens: int) -> list[str]:
    from lmms_eval.api.instance import Instance

    about = {"task": TASK, "doc_id": 0, "repeats": 1, "split": SPLIT}
    requests = [
        Instance(
            request_type="generate_until",
            # The arguments are this request's own: `llava_hf` writes into them.
            arguments=("", _messages, {"max_new_tokens": new_tokens, "until": []}, doc_id, TASK, SPLIT),
            idx=0,
            metadata=about | {"doc_id": doc_id},
        )
        for doc_id in doc_ids
    ]
    return [str(getattr(reply, "text", reply)) for reply in arm.generate_until(requests)]


def _messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["image"].convert("RGB")}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def _png(seed: int) -> bytes:
    """A picture of 640 x 480 with edges and noise, as a PNG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BOX)
    noise = rng.integers(-8, 9, (480, 640, 3))
    picture = Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["<pad>", "<unk>", "USER:", "ASSISTANT:", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],  # LLaVA takes no token types
    )
    fast.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return fast


if __name__ == "__main__":
    main()
