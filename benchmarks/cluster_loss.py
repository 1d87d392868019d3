"""What a step over a million class centres costs: RICE's loss over a sample of them, beside a softmax over all.

    regiontower bench cluster-loss [--classes 1000000] [--processes 1] --json

Both arms hold the same centres in fp32 with two moments of Adam (AdamW for the full softmax; the lazy SparseAdam over
the sampled rows for ours) and see the same embeddings. Each runs in a process of its own, so that peaks of memory do
not mix, and the two take turns. `memory_ratio` compares what a step needs beyond weights and moments (peak resident set
less those), `total_memory_ratio` the peaks themselves.
"""

import argparse
import gc
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from regiontower.benchmarks._stamp import stamp
from regiontower.train_stages.class_shard import ClassShard
from regiontower.train_stages.cluster_loss import ClusterLossConfig, cluster_discrimination_loss

DIM, REGIONS, SAMPLE_RATE = 512, 256, 0.1
ARMS = ("ours", "full")
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000, help="K")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run, after one that is not")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each arm, in alternation")
    parser.add_argument("--processes", type=int, default=1, help="gloo processes that share the centres (ours alone)")
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(run_arm(arguments)))
        return
    arms = ARMS if arguments.processes == 1 else ARMS[:1]
    runs = {arm: [] for arm in arms}
    for _ in range(arguments.rounds):
        for arm in arms:
            runs[arm].append(in_fresh_processes(arm, arguments))
    best = {arm: summary(found) for arm, found in runs.items()}
    ours = best["ours"]
    options = f"--classes {arguments.classes} --processes {arguments.processes}"
    results = {
        "command": f"regiontower bench cluster-loss {options} --json",
        "classes": arguments.classes,
        "processes": arguments.processes,
        "resident_gib": round(ours["resident"] / GIB, 3),
        "step_gib": {arm: round(row["step"] / GIB, 3) for arm, row in best.items()},
        "seconds": {arm: round(row["seconds"], 3) for arm, row in best.items()},
        # What grows with K, in this process: weights and two moments, and the sample's part of a step.
        "classes_in_16_gib": int(16 * GIB / ((ours["resident"] + ours["step"]) / arguments.classes)),
        **stamp({}),
    }
    if "full" in best:
        full = best["full"]
        results |= {
            "time_ratio": round(full["seconds"] / ours["seconds"], 2),
            "memory_ratio": round(full["step"] / ours["step"], 2),
            "total_memory_ratio": round((full["resident"] + full["step"]) / (ours["resident"] + ours["step"]), 2),
        }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def summary(runs: list[list[dict]]) -> dict[str, float]:
    """The median over runs; of several processes the one with the largest number."""
    keys = ("seconds", "resident", "step")
    return {key: statistics.median(max(row[key] for row in run) for run in runs) for key in keys}


def in_fresh_processes(arm: str, arguments: argparse.Namespace) -> list[dict]:
    """`run_arm` in as many new processes as asked for."""
    command = [sys.executable, __file__, "--arm", arm]
    for name in ("classes", "steps", "processes", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(arguments.processes):
        names = {"RANK": rank, "WORLD_SIZE": arguments.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in names.items()}
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"regiontower: the arm {arm!r} failed, most likely for lack of memory; ask for fewer --classes.")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def run_arm(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step; bytes of weights and moments, and bytes a step needs beyond them."""
    torch.set_num_threads(max(1, arguments.threads // arguments.processes))
    if arguments.processes > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    shard = ClassShard.mine(arguments.classes)
    generator = torch.Generator().manual_seed(0)
    baseline = _resident()
    centres = torch.nn.Parameter(torch.empty(shard.size, DIM).normal_(std=0.01, generator=generator))
    if arguments.arm == "ours":
        optimizer: torch.optim.Optimizer = torch.optim.SparseAdam([centres], lr=1e-3)
    else:
        optimizer = torch.optim.AdamW([centres], lr=1e-3, fused=True)
    config = ClusterLossConfig(sample_rate=SAMPLE_RATE)
    regions = REGIONS // arguments.processes
    seconds = []
    for _ in range(arguments.steps + 1):
        embeds = torch.randn(regions, DIM, generator=generator, requires_grad=True)
        labels = torch.randint(arguments.classes, (regions, 1), generator=generator)
        started = time.perf_counter()
        if arguments.arm == "ours":
            valid = torch.ones_like(labels, dtype=torch.bool)
            loss = cluster_discrimination_loss(
                embeds, centres, labels, valid, config, shard=shard, row_sparse=True
            ).loss
        else:
            loss = full_softmax(embeds, centres, labels[:, 0], config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    gc.collect()
    held = 3 * centres.numel() * centres.element_size()  # weights and two moments
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds[1:]), "resident": held, "step": peak - baseline - held}


def full_softmax(embeds: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, config: ClusterLossConfig):
    """The usual margin softmax over every centre (CosFace), by torch's cross-entropy."""
    logits = F.linear(config.scale * F.normalize(embeds, dim=-1), F.normalize(centres, dim=-1))
    logits[torch.arange(len(labels)), labels] -= config.scale * config.margin
    return F.cross_entropy(logits, labels)


def _resident() -> int:
    """Bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
