"""Region-aware vision encoders for LLaVA-style multimodal LLMs.

Importing this package registers nothing and imports no torch; import `regiontower.vision_towers` or `regiontower.mllm`
for the models.
"""

__version__ = "0.1.0"
