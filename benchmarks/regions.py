"""What regions cost: all boxes of an image in one pass of a region tower, beside a pass of the ViT for every crop.

    regiontower bench regions [--boxes 1 8 32 128] [--rounds 7] --json

ViT-B/16 at 224 px, one image, random weights, float32. In every round all of these take their turn: the bare forward of
each native tower on the image, our towers on the same weights with all boxes, and the native towers on the boxes cut
out and resized to 224 px, in batches of the size that was fastest beforehand. `crops_over_ours` and `ours_over_forward`
are medians of the rounds' ratios; of the passes over the image, which are short, the best of `PASSES` in a row counts.
Cutting and resizing is left out of the time of the crops.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, MLCDVisionConfig, MLCDVisionModel, PreTrainedModel

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.vision_towers import ClocVisionModel, RiceVisionConfig, RiceVisionModel, UmgClipVisionModel

SIDE, PATCH = 224, 16
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BATCHES = (1, 2, 4, 8, 16, 32)
PASSES = 3
NATIVES = {"rice": "mlcd", "cloc": "clip", "umg_clip": "clip"}  # whose weights each of our towers holds
Towers = dict[str, PreTrainedModel]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[1, 8, 32, 128], help="boxes an image")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median ratio counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tiny ViT, to try the script out")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = SIZES | ({"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2} if arguments.small else {})
    natives, ours = towers(sizes)
    batches = {name: best_batch(native) for name, native in natives.items()}
    found: dict[str, dict] = {name: {"crops_batch": batches[NATIVES[name]]} for name in ours}
    for count in arguments.boxes:
        for name, row in ratios(natives, ours, count, batches, arguments.rounds).items():
            found[name][str(count)] = row
    results = {
        **found,
        "command": typed("regions", parser, arguments),
        "tower": "ViT-B/16, 224 px, float32, one image" if not arguments.small else "a tiny ViT",
        "threads": arguments.threads,
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def towers(sizes: dict[str, Any]) -> tuple[Towers, Towers]:
    """The native towers, and the region towers that hold their weights (`NATIVES`)."""
    mlcd = MLCDVisionModel(MLCDVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)).eval()
    rice = RiceVisionModel(RiceVisionConfig.from_native(mlcd.config)).eval()
    rice.load_state_dict(mlcd.state_dict())
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)).eval()
    ours = {"rice": rice, "cloc": ClocVisionModel.from_native(clip), "umg_clip": UmgClipVisionModel.from_native(clip)}
    return {"mlcd": mlcd, "clip": clip}, ours


def best_batch(native: PreTrainedModel) -> int:
    """The batch size with which crops are fastest here."""

    def seconds(batch: int) -> float:
        crops = torch.randn(batch, 3, SIDE, SIDE)
        return min(timed(lambda: native(crops)) for _ in range(2)) / batch

    seconds(1)  # warm up
    return min(BATCHES, key=seconds)


def ratios(
    natives: Towers, ours: Towers, count: int, batches: dict[str, int], rounds: int
) -> dict[str, dict[str, float]]:
    """`crops_over_ours` and `ours_over_forward` of each of our towers for `count` boxes."""
    pixels, crops = torch.randn(1, 3, SIDE, SIDE), torch.randn(count, 3, SIDE, SIDE)
    corners = torch.rand(1, count, 2) * SIDE * 0.7
    boxes = torch.cat([corners, corners + SIDE * (0.1 + 0.2 * torch.rand(1, count, 2))], dim=-1)
    seconds: list[dict[str, float]] = []
    for number in range(rounds + 1):
        row = {f"forward {name}": best_of(lambda tower=tower: tower(pixels)) for name, tower in natives.items()}
        row |= {name: best_of(lambda tower=tower: tower(pixels, boxes)) for name, tower in ours.items()}
        if not number:
            continue  # that was to warm up; the crops have been
        for name, tower in natives.items():
            parts = crops.split(batches[name])
            row[f"crops {name}"] = timed(lambda tower=tower, parts=parts: [tower(part) for part in parts])
        seconds.append(row)
    return {
        name: {
            "crops_over_ours": round(statistics.median(row[f"crops {native}"] / row[name] for row in seconds), 2),
            "ours_over_forward": round(statistics.median(row[name] / row[f"forward {native}"] for row in seconds), 3),
        }
        for name, native in NATIVES.items()
    }


def best_of(call: Callable[[], object]) -> float:
    """Seconds of the best of `PASSES` calls."""
    return min(timed(call) for _ in range(PASSES))


@torch.inference_mode()
def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
