"""Which feature of a region gives clusters that mean something: purity by how the region is cut out, on scenes.

    regiontower bench cluster-features --out DIR [--tower nano-clip] [--scenes 2500] [--clusters 300] --json

Names (colour and kind) are known for every region of a scene; no cluster has seen them.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from regiontower.benchmarks._stamp import stamp
from regiontower.train_stages.cluster_quality import cluster_quality
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.region_clusters import ClusterConfig, write_clustered
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers import load_tower
from regiontower.vision_towers.packaged import model_source

FEATURES = ("masked_crop", "crop", "region")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the scenes")
    parser.add_argument("--tower", default="nano-clip", help="packaged name, folder or hub id")
    parser.add_argument("--scenes", type=int, default=2_500, help="how many scenes, from seed 0")
    parser.add_argument("--clusters", type=int, default=300, help="K of k-means")
    parser.add_argument("--crop-side", type=int, default=56, help="pixels of a cut-out region")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    records = read_records(write_scenes(arguments.out / "scenes", arguments.scenes, 0))
    tower = load_tower(arguments.tower, dtype=torch.float32)
    config = ClusterConfig(crop_side=arguments.crop_side)
    quality = {}
    for feature in FEATURES:
        with tempfile.TemporaryDirectory() as folder:
            asked = dataclasses.replace(config, feature=feature)
            path = Path(folder) / "clustered.jsonl"
            write_clustered(records, tower, arguments.clusters, path, asked, cache_dir=arguments.out / "pixels")
            root = arguments.out / "scenes"
            quality[feature] = cluster_quality(read_records(path, image_root=root).records)
    options = f"--scenes {arguments.scenes} --clusters {arguments.clusters} --crop-side {arguments.crop_side}"
    results = {
        "command": f"regiontower bench cluster-features --out DIR {options} --json",
        "quality": quality,
        **stamp({"tower": Path(model_source(arguments.tower))}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
