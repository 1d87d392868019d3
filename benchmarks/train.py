"""Packed and grouped batches beside TRL's SFTTrainer, and alignment on kept features beside alignment with the tower.

    regiontower bench train [--rounds 5] [--steps 6] [--threads 2] --json

Packing: nano's tower (frozen, 64 image tokens) and a Llama of 30 million parameters in bf16, on region instructions
whose text has a median of 40 tokens and 5 % above 700. Every arm may hold `--budget` padded tokens a step: ours packed
is one row of them; ours grouped, batches of like lengths that take so many on the average; TRL, the batch size that is
fastest among those whose average batch fits. Real tokens a second count. Arms take turns in every round, and medians of
the rounds' ratios are given. `packing_bound` is what packing can bring at most: 1 + (1 - f)(rho - 1), f the tower's
share of our packed step, rho the peer's padded over its real tokens. Every batch of the peer is an optimizer step, as
every row of ours is.

Cache: a tower of ViT-B/16's size at 224 px before nano's language model, and before one of SmolLM2-135M's sizes; only
projectors train. Steps from kept features over steps with the tower; `vitb_135m_limit` is (tower + rest) / rest.

Weights are random: what a step takes does not depend on them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.benchmarks._train_arms import (
    CPU,
    Speed,
    grouped_arm,
    packed_arm,
    packing_model,
    peer_arm,
    plain_twin,
)
from regiontower.benchmarks._train_cache import CacheArms, temporary
from regiontower.benchmarks._train_samples import LONGEST, make_samples
from regiontower.train_stages.engine.attention import attention_kernels
from regiontower.train_stages.mllm_data import Sample
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers.packaged import model_source

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of which the median ratio counts")
    parser.add_argument(
        "--steps", type=int, default=6, help="timed steps of ours a round; the peer sees as many tokens"
    )
    parser.add_argument("--budget", type=int, default=4096, help="padded tokens a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("packing", "cache"), help="one of the two parts")
    parser.add_argument("--tokenizer", default="nano", help="a model or folder whose tokenizer is used")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script out")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    with temporary() as folder:
        scenes = write_scenes(Path(folder) / "scenes", 8 if arguments.small else 96, 0, progress=False)
        if arguments.only != "cache":
            results |= packing(arguments, scenes)
        if arguments.only != "packing":
            results |= cache(arguments, scenes, folder)
    results |= {"command": typed("train", parser, arguments), "small": arguments.small, **stamp({})}
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def packing(arguments: argparse.Namespace, scenes: Path) -> dict[str, Any]:
    """`packed_over_peer`, `grouped_over_peer`, `packing_bound`, and what they come from."""
    tokenizer = AutoTokenizer.from_pretrained(model_source(arguments.tokenizer))
    model, processor = packing_model(tokenizer, arguments.small)
    longest = min(LONGEST, arguments.budget - 64)
    samples = make_samples(scenes, processor, 64 if arguments.small else 1024, 0, longest)
    twin = plain_twin(model, processor)
    mean = sum(len(sample.ids) for sample in samples) / len(samples)

    def peer(batch: int, share: float = 1.0) -> Speed:
        steps = max(2, round(share * arguments.steps * arguments.budget / (batch * mean)))
        return peer_arm(twin, processor, samples, batch, steps)

    batches = BATCHES[:2] if arguments.small else BATCHES
    tried = {batch: peer(batch, 0.5) for batch in batches if batch * mean <= arguments.budget}
    # The average batch may hold the budget, padding included; a batch of one always may.
    allowed = {
        batch: speed for batch, speed in tried.items() if batch == 1 or batch * mean * speed.padding <= arguments.budget
    }
    best = max(allowed, key=lambda batch: allowed[batch].tokens)
    arms: dict[str, Callable[[], Speed]] = {
        "packed": lambda: packed_arm(model, processor, samples, arguments.budget, arguments.steps),
        "grouped": lambda: grouped_arm(model, processor, samples, arguments.budget, arguments.steps),
        "peer": lambda: peer(best),
    }
    rounds = alternate(arms, arguments.rounds)
    rho = statistics.median(row["peer"].padding for row in rounds)
    share = statistics.median(tower_share(model, samples, row["packed"]) for row in rounds)
    return {
        "packed_over_peer": ratio(rounds, "packed", "peer"),
        "grouped_over_peer": ratio(rounds, "grouped", "peer"),
        "packing_bound": round(1 + (1 - share) * (rho - 1), 3),
        "packing": {
            "tokens_per_s": {arm: round(statistics.median(row[arm].tokens for row in rounds), 1) for arm in arms},
            "padding": {arm: round(statistics.median(row[arm].padding for row in rounds), 3) for arm in arms},
            "tower_share": round(share, 3),
            "peer_batch": best,
            "peer_tried": {
                str(b): {"tokens_per_s": round(s.tokens, 1), "padding": round(s.padding, 3)} for b, s in tried.items()
            },
            "text_tokens": text_quantiles(samples, processor.image_token_id),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
    }


def cache(arguments: argparse.Namespace, scenes: Path, folder: str) -> dict[str, Any]:
    """`cached_over_uncached`."""
    tokenizer = model_source(arguments.tokenizer)
    found: dict[str, float] = {}
    for name in ("vitb_nano", "vitb_135m"):
        arms = CacheArms(
            name, AutoTokenizer.from_pretrained(tokenizer), scenes, f"{folder}/{name}", arguments.steps, arguments.small
        )
        rounds = alternate({"live": arms.live, "cached": arms.cached}, arguments.rounds)
        found[name] = ratio(rounds, "cached", "live")
        if name == "vitb_135m":
            found["vitb_135m_limit"] = round(statistics.median(arms.limit(row["cached"]) for row in rounds), 2)
    return {"cached_over_uncached": found}


def alternate(arms: dict[str, Callable[[], Speed]], rounds: int) -> list[dict[str, Speed]]:
    """Every arm once a round, in another order each time, so that none always follows the same one."""
    found = []
    with tqdm(total=rounds * len(arms), desc=" / ".join(arms), unit="run", file=sys.stderr) as bar:
        for number in range(rounds):
            names = list(arms)
            names = names[number % len(names) :] + names[: number % len(names)]
            row = {}
            for name in names:
                row[name] = arms[name]()
                bar.update()
            found.append(row)
    return found


def ratio(rounds: list[dict[str, Speed]], ours: str, other: str) -> float:
    """Median over the rounds of real tokens a second, one over the other."""
    return round(statistics.median(row[ours].tokens / row[other].tokens for row in rounds), 3)


@torch.no_grad()
def tower_share(model: Any, samples: list[Sample], packed: Speed) -> float:
    """Of our packed step's time."""
    count = max(1, round(packed.pictures))
    pixels = torch.randn(count, 3, *samples[0].pixels.shape[-2:]) if samples[0].pixels is not None else torch.zeros(0)
    boxes = torch.tensor([1.0, 1.0, 40.0, 40.0]).expand(count, 4, 4).contiguous()
    seconds = []
    with attention_kernels(CPU, "bf16"), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            began = time.perf_counter()
            model.model.vision_tower(pixels, boxes=boxes, output_hidden_states=True)
            seconds.append(time.perf_counter() - began)
    return min(1.0, statistics.median(seconds) / packed.step)


def text_quantiles(samples: list[Sample], image_id: int) -> dict[str, int]:
    """Median and 95th percentile of tokens that are no image tokens."""
    lengths = sorted(len(sample.ids) - sample.ids.count(image_id) for sample in samples)
    return {"median": lengths[len(lengths) // 2], "p95": lengths[int(0.95 * len(lengths))]}


if __name__ == "__main__":
    main()
