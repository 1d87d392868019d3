"""The questions we train on and evaluate with, in one place, so that the two never drift apart.

`<region>` stands for a region prompt: the processor replaces it by what its `region_prompt` asks for (an embedding,
coordinates, both, or a box drawn into the image).
"""

import re

IMAGE_TOKEN = "<image>"
REGION_TOKEN = "<region>"
NO_BOX = "none"  # the answer to "where is ..." when nothing fits; every box format reads it as "no box"

LOCATE = "Where is {phrase}?"  # -> boxes in the model's declared format, or NO_BOX
REFER = f"What is in {REGION_TOKEN}?"  # -> a phrase that is true of this region alone
READ = f"Read {REGION_TOKEN}."  # -> the text inside the region
DESCRIBE_IMAGE = "Describe the image."  # -> an image caption
DESCRIBE_REGION = f"Describe {REGION_TOKEN}."  # -> a region caption (need not single the region out)
CLASSIFY = f"Name {REGION_TOKEN}."  # -> the region's category
COUNT = "How many {noun} are there?"  # -> a number
POINT = f"What is at {REGION_TOKEN}?"  # asked of the small box around a point -> a phrase true of what lies there
COMPARE_SIZE = f"Which is larger, {REGION_TOKEN} or {REGION_TOKEN}?"  # -> FIRST or SECOND
COMPARE_COLOR = f"Are {REGION_TOKEN} and {REGION_TOKEN} the same color?"  # -> YES or NO
COMPARE_KIND = f"Are {REGION_TOKEN} and {REGION_TOKEN} the same kind?"  # -> YES or NO
LIST_ALL = "List everything with boxes."  # -> every object, labelled, in reading order

FIRST, SECOND, YES, NO = "the first", "the second", "yes", "no"

_FIND = re.compile(
    r"\s*(?:find|locate|where\s+(?:is|are))\s+(?:(?:all|every|each)\s+)?(?:(?:the|an?)\s+)?(.+?)\s*[.?!]*\s*",
    re.IGNORECASE | re.DOTALL,
)


def sought_phrase(text: str) -> str | None:
    """What a text asks the place of, as `LOCATE` names it: "Find the red star!" -> "red star". None: it asks for
    something else."""
    found = _FIND.fullmatch(text)
    return found[1] if found else None


def user_message(text: str, with_image: bool) -> dict[str, str]:
    """A user's turn for a chat template; the picture stands before the text.

    Content is plain text, which the templates of language models take; a list of parts is for multimodal ones only.
    """
    return {"role": "user", "content": IMAGE_TOKEN + text if with_image else text}


def assistant_message(text: str) -> dict[str, str]:
    """An answer for a chat template."""
    return {"role": "assistant", "content": text}
