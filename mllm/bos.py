"""Who writes the token that a text begins with: the chat template or the tokenizer."""

from transformers import PreTrainedTokenizerBase


def adds_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer should put its own special tokens around a rendered conversation. Llama 3's template
    writes the first token itself, and its tokenizer would write it once more."""
    return tokenizer.bos_token is None or not text.startswith(str(tokenizer.bos_token))
