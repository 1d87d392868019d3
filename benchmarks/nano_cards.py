"""The cards of the packaged models: what their folders say, and the committed figures.

regiontower bench nano-cards [--weights FOLDER]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from regiontower.benchmarks.nano_build import BOXES, CLUSTERS, CURRICULUM, SCENES, VOCABULARY
from regiontower.mllm import write_mllm_card
from regiontower.vision_towers.model_card import CARD_FILE, CardFacts, table
from regiontower.vision_towers.packaged import WEIGHTS_FOLDER

RESULTS = Path(__file__).parent / "results" / "nano.json"
TOWERS = {
    "nano": "region cluster discrimination with OCR (RICE): `rice-nano-zoom`, then `rice-nano`, on k-means clusters "
    f"(K = {CLUSTERS:,}) of the control's features of regions and on the tokens of transcripts",
    "nano-clip": "image-text contrast (CLIP): `clip-nano-zoom`, then `clip-nano`, with the words of what is in view; "
    "the same ViT, images and steps as `nano`, which it is the control of",
}
FIGURES = (
    ("grounding, IoU of at least 0.5", "regiontower_grounding", "acc50"),
    ("grounding, mean IoU", "regiontower_grounding", "miou"),
    ("referring, exact", "regiontower_referring", "em"),
    ("reading, exact", "regiontower_reading", "em"),
    ("reading words never trained on, exact", "unseen_words_reading", "em"),
    ("absent things rejected", "regiontower_absent", "rejection"),
)
LICENSE = "apache-2.0"
REBUILD = """```console
regiontower bench nano-build --out DIR
```

makes all packaged models from nothing, seed 0 everywhere, in many hours on two cores, and leaves them in `DIR/weights`.
On one machine with the same number of threads two builds are equal to the bit (measured with 50 steps of every stage);
on another one, figures are within 2 points or should be looked into. Here the control's tower was trained with two
threads and everything else with one (`--threads`), and the tower of `nano` with one clipping for all its gradients,
where today's code clips those of the class centres apart. All parts of stage 2 but the last one had the turns of a
conversation in the order in which they were drawn, where today's code shuffles them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER, help="the packaged folders")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name, how in TOWERS.items():
        path = write_mllm_card(arguments.weights / name, CardFacts(license=LICENSE))
        path.write_text(path.read_text(encoding="utf-8") + mllm_sections(name, how, results), encoding="utf-8")
    (arguments.weights / "nano-lm" / CARD_FILE).write_text(lm_card(arguments.weights / "nano-lm"), encoding="utf-8")
    print(json.dumps({"weights": sorted(path.parent.name for path in arguments.weights.glob(f"*/{CARD_FILE}"))}))


def mllm_sections(name: str, how: str, results: dict[str, Any]) -> str:
    """Data, figures, limits and the way to build it again."""
    shares = ", ".join(f"{round(share * SCENES):,} of preset `{preset}`" for preset, share in CURRICULUM.items())
    rows = results["models"][name]
    figures = [(label, _figure(rows[task], metric)) for label, task, metric in FIGURES]
    ceiling = ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in rows["ceiling"].items())
    return f"""
## Data

{SCENES:,} generated scenes of preset `default` ({shares} before them): glyphs and words of fonts over photographs that
Python packages ship, seed 0, every box, phrase and text known. Tower: {how}. Language model: `nano-lm`. Then
`align-nano`, `instruct-nano-single`, `instruct-nano-easy`, `instruct-nano`, and `instruct-nano-named` twice; the tower
stays frozen in all of them.

## Figures

{results["scenes"]} fresh scenes of preset `default`; in brackets 95 % intervals from resampling images.

{table([*figures, ("supervised heads on the same tower", ceiling)])}

## Limits

It knows what scenes show: 43 glyphs in six colours, signs, 249 English words, four kinds of ground. It has never been
told what photographs show, speaks in the few sentence forms it was trained on, and its boxes are in hundredths of the
image. It is here to be tried and compared within minutes, not to be used.

## Build it again

{REBUILD}
"""


def _number(value: float) -> str:
    """A count whole, a share with three decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _figure(task: dict[str, Any], metric: str) -> str:
    value, interval = task[metric], task["ci95"][metric]
    return f"{100 * value:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f}; n = {task['n']})"


def lm_card(folder: Path) -> str:
    """The language model has no figures of its own."""
    stage = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    parameters = sum(row["parameters"] for row in stage["parts"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: {LICENSE}
tags:
- regiontower
---

# nano-lm

A small language model (Gemma 3's architecture, {parameters:,} parameters, {VOCABULARY:,} tokens), trained on the
text form of generated scenes: a list of what is where, and questions about it. `nano` and `nano-clip` begin with it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

source = "."  # this folder
model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
```

## Training

Recipe `lm-nano`: {stage["steps"]:,} steps, {stage["samples"]:,} sequences, loss {stage["final_loss"]:.3f} (of answers),
on {SCENES:,} scenes of preset `default`, two regions of each, boxes written as `{BOXES}`, seed 0.

## Limits

It can say what these scenes need and nothing else.

## Build it again

{REBUILD}
"""


if __name__ == "__main__":
    main()
