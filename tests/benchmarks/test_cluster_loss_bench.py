"""The script runs small, and its full softmax is the usual one for any number of processes."""

import json

import pytest
import torch
import torch.nn.functional as F

from regiontower.benchmarks import cluster_loss, run_benchmark
from regiontower.train_stages.class_shard import ClassShard

CLASSES, REGIONS = 11, 6


def everything():
    generator = torch.Generator().manual_seed(0)
    embeds, centres = torch.randn(REGIONS, 8, generator=generator), torch.randn(CLASSES, 8, generator=generator)
    return embeds, centres, torch.randint(CLASSES, (REGIONS,), generator=generator)


def work(rank, processes):
    embeds, centres, labels = everything()
    shard, mine = ClassShard.mine(CLASSES), slice(rank * REGIONS // processes, (rank + 1) * REGIONS // processes)
    held = centres[shard.first : shard.first + shard.size].clone().requires_grad_()
    own = embeds[mine].clone().requires_grad_()
    loss = cluster_loss.full_softmax(own, held, labels[mine], shard)
    loss.backward()
    return loss.detach(), own.grad / processes, held.grad


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_full_softmax_is_cosface_over_all_centres(in_processes, processes):
    embeds, centres, labels = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in everything())
    cosine = F.normalize(embeds, dim=1) @ F.normalize(centres, dim=1).T
    expected = F.cross_entropy(64 * (cosine - 0.3 * F.one_hot(labels, CLASSES)), labels)
    expected.backward()
    found = in_processes(processes, work, processes)
    assert all(torch.isclose(row[0], expected.detach()) for row in found)
    torch.testing.assert_close(torch.cat([row[1] for row in found]), embeds.grad)
    torch.testing.assert_close(torch.cat([row[2] for row in found]), centres.grad)


def test_figures_are_ratios_of_medians(monkeypatch):
    """Of two processes the slower and the larger one counts."""
    seconds = {"ours": iter([1.0, 3.0, 2.0]), "dense": iter([5.0] * 3), "full": iter([10.0, 30.0, 20.0])}
    memory = {"ours": 1.0, "dense": 4.0, "full": 8.0}

    def run(arm, classes, processes, steps, threads):
        row = {"seconds": next(seconds[arm]), "resident": 2.0, "step": memory[arm], "peak": 9.0}
        return [row, {**row, "seconds": 0.1, "step": 0.1}][:processes]

    monkeypatch.setattr(cluster_loss, "in_fresh_processes", run)
    found = cluster_loss.compared(2, cluster_loss.argparse.Namespace(rounds=3, classes=5, steps=1, threads=2))
    assert (found["time_ratio"], found["memory_ratio"], found["total_memory_ratio"]) == (10, 8, 3.33)
    assert (found["dense_time_ratio"], found["dense_memory_ratio"], found["dense_total_memory_ratio"]) == (4, 2, 1.67)


def test_the_largest_number_of_classes_is_run_and_stays_below(monkeypatch):
    asked = []

    def run(arm, classes, processes, steps, threads):
        asked.append((arm, classes, processes))
        return [{"peak": 2.0**30 + classes * 10_000.0}]  # 1 GiB of libraries, and 10 kB a class

    monkeypatch.setattr(cluster_loss, "in_fresh_processes", run)
    arguments = cluster_loss.argparse.Namespace(limit=16.0, classes=1_000_000, threads=2)
    at = {"resident_gib": 6.144e9 / 2**30, "step_gib": {"ours": 3.856e9 / 2**30}}
    found = cluster_loss.largest(arguments, at)
    assert found["peak_gib"] <= 16 and 1_580_000 <= found["classes"] <= 1_611_000  # 15 GiB hold 1,610,612
    assert asked[0] == ("ours", 1_717_000, 1) and len(asked) < 6


@pytest.mark.parametrize("arm", cluster_loss.ARMS)
def test_an_arm_says_what_it_took(arm, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    row = cluster_loss.run_arm(arm, 20_000, steps=1, threads=1)
    assert row["seconds"] > 0 and row["resident"] == 3 * 20_000 * 512 * 4 and row["peak"] > row["resident"]
    assert cluster_loss.resident("VmHWM") >= cluster_loss.resident("VmRSS") > 1e8


@pytest.mark.slow  # six fresh interpreters
def test_it_runs_small_in_two_processes(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["before"])
    run_benchmark(
        "cluster-loss",
        ["--classes", "3000", "--processes", "2", "--steps", "1", "--rounds", "1", "--limit", "0", "--json"],
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["processes"] == 2 and found["time_ratio"] > 0 and set(found["seconds"]) == set(cluster_loss.ARMS)
    assert found["resident_gib"] == round(3 * 1500 * 512 * 4 / 2**30, 3)
    assert all(value > 0 for value in found["step_gib"].values()) and found["per_process"] == {}
