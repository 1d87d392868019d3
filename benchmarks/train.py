"""Packed and grouped batches beside TRL's SFTTrainer, and alignment on kept features beside alignment with the tower.

    regiontower bench train [--rounds 5] [--steps 6] [--threads 2] --json

Packing: nano's tower (frozen, 64 image tokens) and a Llama of 30 million parameters in bf16, on region instructions
whose text has a median of 40 tokens and 5 % above 700. Every arm may hold `--budget` padded tokens a step, on the
average: ours packed is one row of at most so many; ours grouped, the largest batches of like lengths; TRL, the batch
size that is fastest among those of `BATCHES` that are within it. Real tokens a second count, and a step ends when the
next one may begin to wait for its batch. Arms take turns in every round, and medians of the rounds' ratios are given.
`packing_bound` is what packing can bring at most: 1 + (1 - f)(rho - 1), f the tower's share of our packed step, rho the
peer's padded over its real tokens. It says nothing of what else differs: every batch of the peer is an optimizer step,
as every row of ours is, and on a CPU the peer is fastest one sample at a time, where nothing is padded and the bound is
1. `packed_over_accumulating_peer`, among the details, is for a peer that takes its optimizer steps as rarely as we do.

Cache: a tower of ViT-B/16's size at 224 px before nano's language model, and before one of SmolLM2-135M's sizes; only
projectors train, at the batch sizes of `align-nano` and `align-smollm2`. Steps from kept features over steps with the
tower, waiting for data included; `vitb_135m_limit` is (tower + rest) / rest.

Weights are random: what a step takes does not depend on them. Two cores take about 40 minutes; with
--rounds 3 --steps 4 less than 20. With --json the last line of stdout holds the ratios, and what they come from goes to
stderr.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.benchmarks._train_arms import (
    Speed,
    grouped_arm,
    packed_arm,
    packing_model,
    peer_arm,
    plain_twin,
    tower_share,
)
from regiontower.benchmarks._train_budget import grouped_within, random_padded
from regiontower.benchmarks._train_cache import CacheArms, temporary
from regiontower.benchmarks._train_samples import LONGEST, make_samples
from regiontower.train_stages.mllm_data import Sample
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers.packaged import model_source

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
TRIES = 3  # rounds in which the peer's batch sizes take turns
HEADLINE = ("packed_over_peer", "grouped_over_peer", "packing_bound", "cached_over_uncached")

Arm = TypeVar("Arm", bound=Hashable)


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
    parser.add_argument("--json", action="store_true", help="nothing but the ratios on stdout")
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
    print(json.dumps(results, indent=2), file=sys.stderr if arguments.json else sys.stdout)
    print(json.dumps({key: results[key] for key in HEADLINE if key in results}))


def packing(arguments: argparse.Namespace, scenes: Path) -> dict[str, Any]:
    """`packed_over_peer`, `grouped_over_peer`, `packing_bound`, and what they come from."""
    tokenizer = AutoTokenizer.from_pretrained(model_source(arguments.tokenizer))
    model, processor = packing_model(tokenizer, arguments.small)
    longest = min(LONGEST, arguments.budget - 64)
    samples = make_samples(scenes, processor, 64 if arguments.small else 1024, 0, longest)
    twin = plain_twin(model, processor)
    lengths = [len(sample.ids) for sample in samples]
    mean = sum(lengths) / len(lengths)

    def peer(batch: int, share: float = 1.0) -> Speed:
        steps = max(2, round(share * arguments.steps * arguments.budget / (batch * mean)))
        return peer_arm(twin, processor, samples, batch, steps)

    batches = [batch for batch in BATCHES if batch == 1 or random_padded(lengths, batch) <= arguments.budget]
    batches = batches[:2] if arguments.small else batches
    tries = alternate({batch: partial(peer, batch, 1 / (2 * TRIES)) for batch in batches}, TRIES)
    tried = {batch: statistics.median(row[batch].tokens for row in tries) for batch in batches}
    best = max(batches, key=lambda batch: tried[batch])
    accumulate = max(1, round(arguments.budget / (best * mean)))
    like = grouped_within(lengths, arguments.budget)
    arms: dict[str, Callable[[], Speed]] = {
        "packed": lambda: packed_arm(model, processor, samples, arguments.budget, arguments.steps),
        "grouped": lambda: grouped_arm(model, processor, samples, like, arguments.steps),
        "peer": lambda: peer(best),
        "accumulating": lambda: peer_arm(twin, processor, samples, best, arguments.steps, accumulate),
    }
    rounds = alternate(arms, arguments.rounds)
    rho = statistics.median(row["peer"].padding for row in rounds)
    share = statistics.median(tower_share(model, processor, samples, arguments.budget, row["packed"]) for row in rounds)
    return {
        "packed_over_peer": ratio(rounds, "packed", "peer"),
        "grouped_over_peer": ratio(rounds, "grouped", "peer"),
        "packing_bound": round(1 + (1 - share) * (rho - 1), 3),
        "packing": {
            "tokens_per_s": {arm: round(statistics.median(row[arm].tokens for row in rounds), 1) for arm in arms},
            "padding": {arm: round(statistics.median(row[arm].padding for row in rounds), 3) for arm in arms},
            "tower_share": round(share, 3),
            "packed_over_accumulating_peer": ratio(rounds, "packed", "accumulating"),
            "batches_accumulated": accumulate,
            "grouped_batch": like,
            "peer_batch": best,
            "peer_tokens_per_s_by_batch": {str(batch): round(speed, 1) for batch, speed in tried.items()},
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
            found["vitb_135m_limit"] = round(statistics.median(arms.limit(row["live"]) for row in rounds), 2)
    return {"cached_over_uncached": found}


def alternate(arms: dict[Arm, Callable[[], Speed]], rounds: int) -> list[dict[Arm, Speed]]:
    """Every arm once a round, in another order each time, so that none always follows the same one."""
    found = []
    with tqdm(total=rounds * len(arms), desc=" / ".join(map(str, arms)), unit="run", file=sys.stderr) as bar:
        for number in range(rounds):
            names = list(arms)
            at = number % len(names)
            row = {}
            for name in [*names[at:], *names[:at]]:
                row[name] = arms[name]()
                bar.update()
            found.append(row)
    return found


def ratio(rounds: list[dict[str, Speed]], ours: str, other: str) -> float:
    """Median over the rounds of real tokens a second, one over the other."""
    return round(statistics.median(row[ours].tokens / row[other].tokens for row in rounds), 3)


def text_quantiles(samples: list[Sample], image_id: int) -> dict[str, int]:
    """Median and 95th percentile of tokens that are no image tokens."""
    lengths = sorted(len(sample.ids) - sample.ids.count(image_id) for sample in samples)
    return {"median": lengths[len(lengths) // 2], "p95": lengths[int(0.95 * len(lengths))]}


if __name__ == "__main__":
    main()
