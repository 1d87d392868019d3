"""What keeping a conversation saves: the first token of turn 2 by `ChatSession`, beside plain `generate` from scratch.

    regiontower bench chat [--rounds 9] --json

Two models: the packaged `nano`, and random weights of SmolLM2-135M's sizes behind a ViT-B/16 at 384 px, 576 image
tokens; float32. In every round both arms answer the same second question of the same conversation with one token, in
turn, the order changing from round to round. `reuse`: the session has answered turn 1, its picture is encoded and its
KV prefix kept. `scratch`: picture and whole conversation go through the processor and `generate`. `ttft_ratio` is the
median of the rounds' scratch / reuse. The answers of random weights are not text that tokenises to the same tokens
again, so `same_first_token` means something for `nano` alone.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from regiontower.benchmarks._stamp import stamp
from regiontower.mllm import ChatSession, build_mllm, load_mllm
from regiontower.mllm.answers import model_inputs, text_ids
from regiontower.mllm.prompts import READ, REFER, assistant_message, user_message
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel

# https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
SMOL = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
VIT_B = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
BOXES = [(20.0, 30.0, 120.0, 110.0), (150.0, 90.0, 260.0, 200.0)]
FIRST_ANSWER = 16  # tokens of turn 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of which the median ratio counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--small", action="store_true", help="a tiny model in place of the second, to try the script out"
    )
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    nano = load_mllm("nano", device="cpu", dtype="fp32")
    found: dict[str, Any] = {
        "nano": ratio(*nano, arguments.rounds),
        "smol": ratio(*random_model(nano[1], arguments.small), arguments.rounds),
    }
    results = {
        **found,
        "command": f"regiontower bench chat --rounds {arguments.rounds} --threads {arguments.threads} --json",
        "small": arguments.small,
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def random_model(nano_processor: Any, small: bool) -> tuple[Any, Any]:
    """A region MLLM of SmolLM2-135M's sizes with 576 image tokens, and its processor."""
    language, tower, side = (SMOL, VIT_B, 384) if not small else (SMOL | {"num_hidden_layers": 2}, VIT_B, 48)
    if small:
        tower = VIT_B | {"num_hidden_layers": 2}
    tokenizer = nano_processor.tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model, processor = build_mllm(
        RiceVisionModel(RiceVisionConfig(**tower, image_size=side, patch_size=16)),
        LlamaForCausalLM(LlamaConfig(**language, **ids, pad_token_id=tokenizer.pad_token_id)),
        tokenizer,
    )
    # Rows that no token of this tokenizer has: as many as the real model computes, never chosen.
    suppressed = {*(model.generation_config.suppress_tokens or []), *range(len(tokenizer), language["vocab_size"])}
    model.generation_config.suppress_tokens = sorted(suppressed)
    return model.eval(), processor


def ratio(model: Any, processor: Any, rounds: int) -> dict[str, Any]:
    """Both arms in alternation: `ttft_ratio`, and the medians behind it in milliseconds."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8))
    session = ChatSession(model, processor, image)
    rows: list[dict[str, float]] = []
    same = 0
    for number in range(rounds + 1):
        session.restart(processor)
        session.max_new_tokens = FIRST_ANSWER
        session.ask(REFER, BOXES[:1])
        session.max_new_tokens = 1
        first = processor.tokenizer.decode(session.last_answer_ids)
        arms: dict[str, Callable[[], list[int]]] = {
            "reuse": lambda: second_turn(session),
            "scratch": lambda first=first: from_scratch(model, processor, image, first),
        }
        names = sorted(arms, reverse=number % 2 == 1)
        timed: dict[str, float] = {}
        tokens: dict[str, list[int]] = {}
        for name in names:
            started = time.perf_counter()
            tokens[name] = arms[name]()
            timed[name] = time.perf_counter() - started
        if number:  # round 0 warms up
            rows.append(timed)
            same += tokens["reuse"] == tokens["scratch"]
    return {
        "ttft_ratio": round(statistics.median(row["scratch"] / row["reuse"] for row in rows), 2),
        "reuse_ms": round(1000 * statistics.median(row["reuse"] for row in rows), 1),
        "scratch_ms": round(1000 * statistics.median(row["scratch"] for row in rows), 1),
        "image_tokens": processor.image_tokens(processor.frame(image.size)),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "rounds": rounds,
        "same_first_token": same,
    }


def second_turn(session: ChatSession) -> list[int]:
    session.ask(READ, BOXES[1:])
    return session.last_answer_ids


@torch.inference_mode()
def from_scratch(model: Any, processor: Any, image: Image.Image, first_answer: str) -> list[int]:
    messages = [user_message(REFER, with_image=True), assistant_message(first_answer), user_message(READ, False)]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], boxes=[BOXES])
    ids = model.generate(**model_inputs(model, inputs), max_new_tokens=1, do_sample=False)
    return text_ids(processor, ids[0, inputs["input_ids"].shape[1] :].tolist())


if __name__ == "__main__":
    main()
