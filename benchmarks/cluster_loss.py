"""What a step over a million class centres costs: RICE's loss over a sample of them, beside a softmax over all.

    regiontower bench cluster-loss [--classes 1000000] [--processes 1 2] --json

Three arms hold the same centres of 512 dimensions in fp32 with two moments of Adam, and see the same 256 embeddings:

    ours     RICE's loss at rho = 0.1; gradients of the drawn rows only, moved by AdamW over those rows
             (`rice.row_sparse: true`, as Partial FC does it)
    dense    the same loss, dense gradients, AdamW over all centres (`rice.row_sparse: false`)
    full     a margin softmax over all centres, AdamW

Each run is a process of its own, or as many as share the centres (gloo), and the arms take turns. `memory_ratio`
compares what a step needs beyond weights and moments (peak resident set of the process, less those and less what it
held before), `total_memory_ratio` the peaks with them. With several processes all numbers are those of one of them, the
largest. `dense_...` are the ratios of the full softmax to the arm `dense`. `fits_16_gib` is the largest number of
classes, to half a per cent and found by running one step, with which a process stays within 16 GiB.
"""

import argparse
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.train_stages.class_shard import ClassShard
from regiontower.train_stages.cluster_loss import ClusterLossConfig, cluster_discrimination_loss
from regiontower.train_stages.engine.row_adamw import RowAdamW

DIM, REGIONS, CONFIG = 512, 256, ClusterLossConfig(sample_rate=0.1)
ARMS = ("ours", "dense", "full")
GIB = 1 << 30
Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000, help="K")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of a run, after one that is not")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each arm, in alternation")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="that share the centres")
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--limit", type=float, default=16.0, help="GiB that the largest run may take; 0: no such run")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(run_arm(arguments.arm, arguments.classes, arguments.steps, arguments.threads)))
        return
    found = {count: compared(count, arguments) for count in arguments.processes}
    first = arguments.processes[0]
    results = {
        "command": typed("cluster-loss", parser, arguments),
        "classes": arguments.classes,
        "processes": first,
        **found[first],
        "per_process": {str(count): row for count, row in found.items() if count != first},
        **({f"fits_{arguments.limit:g}_gib": largest(arguments, found[first])} if arguments.limit else {}),
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def compared(processes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of all arms, by as many processes as share the centres."""
    runs: dict[str, list[list[Row]]] = {arm: [] for arm in ARMS}
    for _ in range(arguments.rounds):
        for arm in ARMS:
            runs[arm].append(in_fresh_processes(arm, arguments.classes, processes, arguments.steps, arguments.threads))
    row = {arm: summary(found) for arm, found in runs.items()}
    figures: dict[str, Any] = {}
    for arm, prefix in (("ours", ""), ("dense", "dense_")):
        full, mine = row["full"], row[arm]
        figures |= {
            f"{prefix}time_ratio": round(full["seconds"] / mine["seconds"], 2),
            f"{prefix}memory_ratio": round(full["step"] / mine["step"], 2),
            f"{prefix}total_memory_ratio": round(
                (full["resident"] + full["step"]) / (mine["resident"] + mine["step"]), 2
            ),
        }
    return figures | {
        "resident_gib": round(row["ours"]["resident"] / GIB, 3),
        "step_gib": {arm: round(row[arm]["step"] / GIB, 3) for arm in ARMS},
        "seconds": {arm: round(row[arm]["seconds"], 3) for arm in ARMS},
    }


def largest(arguments: argparse.Namespace, at: dict[str, Any]) -> dict[str, float]:
    """How many classes `ours` can hold in one process of at most `limit` GiB, to half a per cent: first by the memory
    of a class, as measured, then by halving between a run that fits and one that does not."""
    classes = arguments.classes * arguments.limit / (at["resident_gib"] + at["step_gib"]["ours"])
    fits: dict[str, float] = {}
    too_many = math.inf
    while True:
        count = int(classes / 1000) * 1000 or int(classes)
        (row,) = in_fresh_processes("ours", count, 1, 1, arguments.threads)
        peak = row["peak"] / GIB
        if peak <= arguments.limit:
            fits = {"classes": count, "peak_gib": round(peak, 3)}
        else:
            too_many = count
        if fits and too_many - fits["classes"] <= max(1, 0.005 * fits["classes"]):
            return fits
        if not fits:
            classes = count * min(0.99, arguments.limit / peak)
        elif too_many == math.inf:
            classes = count * max(1.005, arguments.limit / peak)
        else:
            classes = (fits["classes"] + too_many) / 2


def summary(runs: list[list[Row]]) -> Row:
    """The median over runs; of several processes the one with the largest number."""
    return {key: statistics.median(max(row[key] for row in run) for run in runs) for key in runs[0][0]}


def in_fresh_processes(arm: str, classes: int, processes: int, steps: int, threads: int) -> list[Row]:
    """`run_arm` in as many new processes as asked for."""
    command = [sys.executable, __file__, "--arm", arm]
    command += ["--classes", str(classes), "--steps", str(steps), "--threads", str(threads)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(processes):
        names = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in names.items()}
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"regiontower: the arm {arm!r} failed, most likely for lack of memory; ask for fewer --classes.")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def run_arm(arm: str, classes: int, steps: int, threads: int) -> Row:
    """Median seconds of a step; bytes of weights and moments, bytes a step needs beyond them, and the whole peak."""
    processes = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, threads // processes))
    if processes > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    shard = ClassShard.mine(classes)
    generator = torch.Generator().manual_seed(shard.first)
    baseline = resident("VmRSS")
    centres = torch.nn.Parameter(torch.empty(shard.size, DIM).normal_(std=0.01, generator=generator))
    if arm == "ours":
        optimizer: torch.optim.Optimizer = RowAdamW([centres], lr=1e-3)
    else:
        optimizer = torch.optim.AdamW([centres], lr=1e-3, fused=True)
    regions = REGIONS // processes
    seconds = []
    for _ in range(steps + 1):
        embeds = torch.randn(regions, DIM, generator=generator, requires_grad=True)
        labels = torch.randint(classes, (regions, 1), generator=generator)
        if processes > 1:
            dist.barrier()
        started = time.perf_counter()
        step(arm, embeds, centres, labels, shard).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    held = 3 * centres.numel() * centres.element_size()  # weights and two moments
    peak = resident("VmHWM")
    if processes > 1:
        dist.destroy_process_group()
    return {
        "seconds": statistics.median(seconds[1:]),
        "resident": held,
        "step": peak - baseline - held,
        "peak": peak,
    }


def step(arm: str, embeds: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, shard: ClassShard):
    """The loss of an arm. labels: `(R, 1)`, one class for each region."""
    if arm == "full":
        return full_softmax(embeds, centres, labels[:, 0], shard)
    valid = torch.ones_like(labels, dtype=torch.bool)
    return cluster_discrimination_loss(
        embeds, centres, labels, valid, CONFIG, shard=shard, row_sparse=arm == "ours"
    ).loss


def full_softmax(embeds: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, shard: ClassShard) -> torch.Tensor:
    """The usual margin softmax over every centre (CosFace): torch's cross-entropy in one process; in several each has
    the logits of its own centres, and the normaliser is exchanged."""
    v = shard.gather_rows(CONFIG.scale * F.normalize(embeds, dim=-1))
    row, here = shard.local(shard.gather_ids(labels[:, None])[:, 0])
    logits = F.linear(v, F.normalize(centres, dim=-1))
    logits[here.nonzero()[:, 0], row[here]] -= CONFIG.scale * CONFIG.margin
    if shard.processes == 1:
        return F.cross_entropy(logits, row)
    own = shard.sum(logits.gather(1, row[:, None])[:, 0] * here)
    top = shard.max(logits.detach().amax(dim=1))
    return (top + shard.sum((logits - top[:, None]).exp_().sum(dim=1)).log() - own).mean()


def resident(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at its peak. Of `getrusage`'s peak a part may be the parent's."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{what}:\s+(\d+) kB$", status, re.M)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
