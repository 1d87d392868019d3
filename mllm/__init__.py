"""Image tokens + region embeddings + text -> text with boxes.

Importing this package registers `region_llava` and `region_llava_next` with `AutoConfig`,
`AutoModelForImageTextToText` and `AutoProcessor`.
"""

from .answers import Answer, Question
from .batched_answers import Likelihood, SharedAnswers, answer_questions
from .build import build_mllm
from .chat import ChatSession
from .config import RegionLlavaConfig, RegionLlavaNextConfig
from .export import export_merged, to_plain_llava
from .load import load_mllm
from .model_card import write_mllm_card
from .modeling import RegionLlavaForConditionalGeneration
from .next_modeling import RegionLlavaNextForConditionalGeneration
from .next_processing import RegionLlavaNextProcessor
from .processing import RegionLlavaProcessor
from .regions import add_regions, load_with_regions
from .register import register_all
from .remote_code import export_mllm_remote_code
from .swap import swap_vision_tower
from .swap_on_disk import swap_checkpoint
from .swap_report import swap_table

register_all()

__all__ = [
    "Answer",
    "ChatSession",
    "Likelihood",
    "Question",
    "RegionLlavaConfig",
    "RegionLlavaForConditionalGeneration",
    "RegionLlavaNextConfig",
    "RegionLlavaNextForConditionalGeneration",
    "RegionLlavaNextProcessor",
    "RegionLlavaProcessor",
    "SharedAnswers",
    "add_regions",
    "answer_questions",
    "build_mllm",
    "export_merged",
    "export_mllm_remote_code",
    "load_mllm",
    "load_with_regions",
    "swap_checkpoint",
    "swap_table",
    "swap_vision_tower",
    "to_plain_llava",
    "write_mllm_card",
]
