"""Chat templates for tokenizers that have none, by name, or from a file."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..vision_towers.errors import UserError

# LLaVA-1.5 (its conversation.py, "vicuna_v1"): the tokenizer of Vicuna v1.5 comes without a template. The token that
# begins the text is the tokenizer's own to write.
VICUNA = """\
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- else -%}
{%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
detailed, and polite answers to the user's questions." -%}
{%- endif -%}
{{- system ~ ' ' -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- 'USER: ' ~ message.content -}}
{%- else -%}{{- ' ASSISTANT: ' ~ message.content ~ eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""
CHAT_TEMPLATES = {"vicuna": VICUNA}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None, source: str) -> None:
    """Give `tokenizer` the template `choice`: a name of `CHAT_TEMPLATES`, or a file of a Jinja template; its own when
    absent.

    source: where the tokenizer comes from, for the message.
    Raises:
        UserError: there is no such template, or none at all.
    """
    if choice is None:
        if tokenizer.chat_template is None:
            known = ", ".join(CHAT_TEMPLATES)
            raise UserError(
                f"the tokenizer of {source} has no chat template; set model.chat_template to {known} or to a file."
            )
        return
    if choice not in CHAT_TEMPLATES and not Path(choice).is_file():
        raise UserError(f"model.chat_template is {choice!r}: neither {', '.join(CHAT_TEMPLATES)} nor a file.")
    tokenizer.chat_template = CHAT_TEMPLATES.get(choice) or Path(choice).read_text(encoding="utf-8")
