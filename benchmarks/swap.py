"""Time and memory of a swap on a checkpoint of real size, beside `cp` of the same files.

regiontower bench swap --out DIR [--gib 6] [--rounds 3] --json

Makes a random Llava of that size (bf16, shards of about 2 GiB, names as on the hub, the tower in the first shard as
there) and a RICE of ViT-L/14 at 336 px. Each round copies the files with `cp`, then swaps in a fresh process with
`--verify bytes`, which hashes every tensor; the order changes from round to round. Needs three times the size on disk.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from regiontower.benchmarks._stamp import stamp
from regiontower.benchmarks._tiny_llavas import tiny_llava
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel

GIB = 2**30
SHARD = 2 * GIB
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
WORKER = """
import json, re, resource, sys
from pathlib import Path
from regiontower.mllm import swap_checkpoint
report = swap_checkpoint(*sys.argv[1:4], verify="bytes")
status = Path("/proc/self/status")
if status.exists():  # Linux: getrusage would count what the parent held when it started this process
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak_rss": peak, "linked_files": report["proof"]["linked_files"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder to work in; what is made there is removed")
    parser.add_argument("--gib", type=float, default=6.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    work = arguments.out / "swap-bench"
    shutil.rmtree(work, ignore_errors=True)
    try:
        source, tower = make_llava(work / "llava", arguments.gib), make_tower(work / "rice", arguments.gib)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        rounds = [_round(source, tower, work, first=number % 2 == 0) for number in range(arguments.rounds)]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    results = {
        "command": f"regiontower bench swap --out DIR --gib {arguments.gib:g} --rounds {arguments.rounds} --json",
        "rounds": rounds,
        "time_over_cp": round(statistics.median(r["swap_seconds"] / r["cp_seconds"] for r in rounds), 3),
        "peak_rss_gib": round(max(r["peak_rss"] for r in rounds) / GIB, 3),
        "checkpoint_gib": round(size / GIB, 3),
        **stamp({}),
    }
    headline = {key: results[key] for key in ("time_over_cp", "peak_rss_gib", "checkpoint_gib")}
    print(json.dumps(results, indent=2), file=sys.stderr if arguments.json else sys.stdout)
    print(json.dumps(headline))


def make_llava(folder: Path, gib: float) -> Path:
    """A random Llava of about `gib`, written shard by shard."""
    tower = LARGE if gib >= 2 else SMALL
    width = 4096 if gib >= 2 else 1024 if gib >= 0.25 else 128  # few layers: each costs memory as Python objects
    _, processor = tiny_llava("Llava")
    layer = 4 * width * width + 3 * width * int(2.6875 * width)
    text = {
        "vocab_size": 32064,
        "hidden_size": width,
        "intermediate_size": int(2.6875 * width),
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "num_hidden_layers": max(1, round(gib * GIB / 2 / layer)),
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=336, patch_size=14, projection_dim=768),
        text_config=LlamaConfig(**text),
        image_token_index=processor.image_token_id,
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    shards: list[list[tuple[str, Any]]] = [[]]
    filled = 0
    # Tower and projector first, as on the hub.
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: "vision" not in item[0]):
        if filled > SHARD:
            shards, filled = [*shards, []], 0
        shards[-1].append((name, tensor.shape))
        filled += 2 * tensor.numel()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        state = {_hub_name(name): torch.randn(shape).mul_(0.02).to(torch.bfloat16) for name, shape in shard}
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def make_tower(folder: Path, gib: float) -> Path:
    """A random RICE: ViT-L/14 beside a large model, a tiny one beside a small."""
    sizes = LARGE if gib >= 2 else SMALL
    RiceVisionModel(RiceVisionConfig(**sizes, image_size=336, patch_size=14)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _round(source: Path, tower: Path, work: Path, first: bool) -> dict[str, Any]:
    """One copy and one swap; `first`: the copy before the swap."""
    found: dict[str, Any] = {}
    for task in (_copy, _swap) if first else (_swap, _copy):
        found |= task(source, tower, work)
        subprocess.run(["sync"], check=True)  # neither pays for what the other left to be written
    return found


def _copy(source: Path, tower: Path, work: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(work / "copy")], check=True)
    seconds = time.perf_counter() - begin
    shutil.rmtree(work / "copy")
    return {"cp_seconds": round(seconds, 2)}


def _swap(source: Path, tower: Path, work: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    command = [sys.executable, "-c", WORKER, str(source), str(tower), str(work / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    shutil.rmtree(work / "out")
    return {"swap_seconds": round(seconds, 2), **json.loads(done.stdout.strip().splitlines()[-1])}


def _hub_name(name: str) -> str:
    name = name.replace("lm_head.", "language_model.lm_head.")
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
    return name.replace("model.language_model.", "language_model.model.").removeprefix("model.")


if __name__ == "__main__":
    main()
