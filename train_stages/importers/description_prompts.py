"""The prompts with which LLaVA's published data asks for a caption, normalised (`normalise_phrase`, no end mark)."""

_BRIEF = """
describe the image
describe the image concisely
describe the following image concisely
provide a brief description of the given image
give a brief description of the image
offer a succinct explanation of the picture presented
summarize the visual content of the image
summarize the visual content of the following image
give a short and clear explanation of the subsequent image
share a concise interpretation of the image provided
present a compact description of the photo's key features
relay a brief, clear account of the picture shown
render a clear and concise summary of the photo
render a clear and concise summary of the photo below
write a terse but informative summary of the picture
write a terse but informative summary of the following picture
create a compact narrative representing the image presented
what is this
what is in the photo
"""

_DETAILED = """
describe the following image
describe the following image in detail
provide a detailed description of the given image
give an elaborate explanation of the image you see
share a comprehensive rundown of the presented image
offer a thorough analysis of the image
explain the various aspects of the image before you
clarify the contents of the displayed image with great detail
characterize the image using a well-detailed description
break down the elements of the image in a detailed manner
walk through the important details of the image
portray the image with a rich, descriptive narrative
narrate the contents of the image with precision
analyze the image in a comprehensive and detailed manner
illustrate the image through a descriptive explanation
examine the image closely and share its details
write an exhaustive depiction of the given image
"""

# "" is `<image>` alone: LLaVA's pre-training template has no words beside it.
DESCRIPTION_PROMPTS = frozenset(["", *_BRIEF.split("\n"), *_DETAILED.split("\n")])
