"""Other ways to ask what `mllm.prompts` asks, for data that a general language model is tuned on.

A model that is to follow instructions should not need one exact sentence. Each list begins with the prompt itself.
"""

from __future__ import annotations

from ..mllm import prompts
from ..mllm.prompts import REGION_TOKEN

R = REGION_TOKEN

WORDINGS: dict[str, tuple[str, ...]] = {
    prompts.LOCATE: (
        prompts.LOCATE,
        "Locate {phrase}.",
        "Find {phrase} in the image and give its box.",
        "Give the bounding box of {phrase}.",
        "Point out {phrase} with a box.",
    ),
    prompts.REFER: (
        prompts.REFER,
        f"Which object is {R}? Give a short phrase that fits nothing else in the image.",
        f"Refer to {R} in a few words.",
        f"How would you single out {R}?",
    ),
    prompts.READ: (
        prompts.READ,
        f"What does the text in {R} say?",
        f"Transcribe {R}.",
        f"Which text is written in {R}?",
    ),
    prompts.DESCRIBE_REGION: (
        prompts.DESCRIBE_REGION,
        f"What can be seen in {R}?",
        f"Give a description of {R}.",
        f"Write a sentence about {R}.",
    ),
    prompts.CLASSIFY: (
        prompts.CLASSIFY,
        f"What kind of thing is {R}?",
        f"Which category does {R} belong to?",
    ),
    prompts.COMPARE_SIZE: (
        prompts.COMPARE_SIZE,
        f"Compare {R} and {R}: which one takes up more of the image?",
        f"Of {R} and {R}, which is the bigger one?",
    ),
    prompts.COMPARE_COLOR: (
        prompts.COMPARE_COLOR,
        f"Do {R} and {R} have the same color?",
    ),
    prompts.COMPARE_KIND: (
        prompts.COMPARE_KIND,
        f"Do {R} and {R} show the same kind of thing?",
    ),
    prompts.COUNT: (
        prompts.COUNT,
        "Count the {noun}.",
        "What is the number of {noun} in the image?",
    ),
    prompts.DESCRIBE_IMAGE: (
        prompts.DESCRIBE_IMAGE,
        "What is in this image?",
        "Write a caption for the image.",
    ),
    prompts.LIST_ALL: (
        prompts.LIST_ALL,
        "Name every object and give its box.",
    ),
}
"""Prompt -> its wordings. They hold the same fields, in the same order."""
