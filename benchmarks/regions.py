"""What regions cost: all boxes of an image in one pass of a region tower, beside a pass of the ViT for every crop.

    regiontower bench regions [--boxes 1 8 32 128] [--rounds 7] --json

ViT-B/16 at 224 px, one image, random weights, float32. Three things take turns in every round: the bare forward of the
native tower on the image, our tower with all boxes, and the native tower on the boxes cut out and resized to 224 px, in
batches of the size that was fastest beforehand. `crops_over_ours` and `ours_over_forward` are medians of the rounds'
ratios. Cutting and resizing is left out of the time of the crops.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, MLCDVisionConfig, MLCDVisionModel, PreTrainedModel

from regiontower.benchmarks._stamp import stamp
from regiontower.vision_towers import ClocVisionModel, RiceVisionConfig, RiceVisionModel, UmgClipVisionModel

SIDE, PATCH = 224, 16
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BATCHES = (1, 4, 16)


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
    found = {}
    for name, (native, ours) in towers(sizes).items():
        batch = best_batch(native)
        found[name] = {str(count): ratios(native, ours, count, batch, arguments.rounds) for count in arguments.boxes}
        found[name]["crops_batch"] = batch
    results = {
        **found,
        "command": f"regiontower bench regions --rounds {arguments.rounds} --threads {arguments.threads} --json",
        "tower": "ViT-B/16, 224 px, float32, one image" if not arguments.small else "a tiny ViT",
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def towers(sizes: dict[str, int]) -> dict[str, tuple[PreTrainedModel, PreTrainedModel]]:
    """Name -> native tower, and the region tower that holds the same weights."""
    mlcd = MLCDVisionModel(MLCDVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)).eval()
    rice = RiceVisionModel(RiceVisionConfig.from_native(mlcd.config)).eval()
    rice.load_state_dict(mlcd.state_dict())
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)).eval()
    return {
        "rice": (mlcd, rice),
        "cloc": (clip, ClocVisionModel.from_native(clip)),
        "umg_clip": (clip, UmgClipVisionModel.from_native(clip)),
    }


def best_batch(native: PreTrainedModel) -> int:
    """The batch size with which crops are fastest here."""

    def seconds(batch: int) -> float:
        return min(timed(lambda: native(torch.randn(batch, 3, SIDE, SIDE))) for _ in range(2)) / batch

    seconds(1)  # warm up
    return min(BATCHES, key=seconds)


def ratios(native: PreTrainedModel, ours: PreTrainedModel, count: int, batch: int, rounds: int) -> dict[str, float]:
    """`crops_over_ours` and `ours_over_forward` for `count` boxes."""
    pixels, crops = torch.randn(1, 3, SIDE, SIDE), torch.randn(count, 3, SIDE, SIDE)
    corners = torch.rand(1, count, 2) * SIDE * 0.7
    boxes = torch.cat([corners, corners + SIDE * (0.1 + 0.2 * torch.rand(1, count, 2))], dim=-1)

    def all_crops() -> None:
        for part in crops.split(batch):
            native(part)

    arms: dict[str, Callable[[], object]] = {
        "forward": lambda: native(pixels),
        "ours": lambda: ours(pixels, boxes),
        "crops": all_crops,
    }
    for arm in ("forward", "ours"):
        arms[arm]()  # warm up
    seconds = [{arm: timed(call) for arm, call in arms.items()} for _ in range(rounds)]
    return {
        "crops_over_ours": round(statistics.median(row["crops"] / row["ours"] for row in seconds), 2),
        "ours_over_forward": round(statistics.median(row["ours"] / row["forward"] for row in seconds), 3),
    }


@torch.inference_mode()
def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
