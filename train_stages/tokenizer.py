"""The tokenizer of the nano language model: a sentencepiece BPE model that plain transformers opens.

sentencepiece trains it; what is saved is transformers' own `TokenizersBackend` (`tokenizer.json`) with the same pieces
and merges. The class matters: transformers 5 rebuilds every tokenizer class of a model family (`LlamaTokenizer`, ...)
from its own pipeline, so that a model saved under such a name comes back with other rules. `TokenizersBackend` is read
back as it was written, also when a `config.json` of any model type lies beside it.

BPE and not unigram: on texts of few distinct words unigram's estimation drops the most frequent of them ("red", "is")
in favour of their parts, which costs a fifth more tokens.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..mllm.prompts import IMAGE_TOKEN, REGION_TOKEN
from ..vision_towers.errors import UserError

PAD_TOKEN, UNK_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<unk>", "<s>", "</s>"
USER_TOKEN, ASSISTANT_TOKEN, END_TOKEN = "<|user|>", "<|assistant|>", "<|end|>"
MARKERS = (IMAGE_TOKEN, REGION_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, END_TOKEN)
SPECIAL_TOKENS = (PAD_TOKEN, UNK_TOKEN, BOS_TOKEN, EOS_TOKEN, *MARKERS)

SENTENCEPIECE_FILE = "sentencepiece.model"  # kept for other tools; transformers reads tokenizer.json alone
PRINTABLE_ASCII = "".join(map(chr, range(33, 127)))  # never spelled in bytes, however rare in the texts

# Pictures first, then words, whatever their order in the message: `<image>` stands at the start of its turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['user', 'assistant'] -%}
{{- raise_exception("This chat template knows the roles 'user' and 'assistant' only, not '" ~ message.role ~ "'.") -}}
{%- endif -%}
{%- set parts = namespace(text='') -%}
{%- if message.content is string -%}
{%- set parts.text = message.content -%}
{%- else -%}
{%- for item in message.content if item.type == 'image' -%}{%- set parts.text = parts.text ~ '<image>' -%}{%- endfor -%}
{%- for item in message.content if item.type == 'text' -%}
{%- set parts.text = parts.text ~ item.text -%}
{%- endfor -%}
{%- endif -%}
{%- if message.role == 'user' -%}
{{- '<|user|>' ~ parts.text ~ '<|end|>' -}}
{%- else -%}
{{- '<|assistant|>' -}}
{%- generation -%}{{- parts.text ~ '<|end|>' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], out_dir: str | Path, vocab_size: int = 2048) -> PreTrainedTokenizerBase:
    """Train a sentencepiece BPE model on `texts` and save it to `out_dir` as a transformers tokenizer.

    Text is left as it is (no normalisation, no added space), every digit is a token of its own, what has no piece is
    spelled in bytes, so `decode(encode(text)) == text` for every text without the sign U+2581 (sentencepiece's own
    space) and without one of `SPECIAL_TOKENS`, each of which is always one token. No token is added by itself at
    either end. One thread, so the same texts give the same files.

    `vocab_size` counts special tokens, 256 bytes and pieces; few texts give fewer (`len(tokenizer)` tells).
    Raises `UserError` when there is no text or `vocab_size` has no room for the characters.
    """
    model = _train_bpe([text for text in texts if text.strip()], vocab_size)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / SENTENCEPIECE_FILE).write_bytes(model)
    tokenizer = to_transformers(model)
    tokenizer.save_pretrained(out)
    return tokenizer


def to_transformers(model: bytes) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with the pieces, merges and ids of a sentencepiece BPE `model` (its bytes)."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    backend = Tokenizer(BPE(vocab, _merges(pieces, vocab), unk_token=UNK_TOKEN, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens=list(MARKERS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token of the vocabulary, such as `END_TOKEN`."""
    return tokenizer.convert_tokens_to_ids(token)  # pyright: ignore[reportReturnType]  # a list for a list of tokens


def _merges(pieces: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which the pieces were learned (their ids)."""
    learned = [
        (piece, i)
        for piece, i in vocab.items()
        if len(piece) > 1 and not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    ]
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in sorted(learned, key=lambda item: item[1])
        if piece not in SPECIAL_TOKENS
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


def _train_bpe(texts: list[str], vocab_size: int) -> bytes:
    if not texts:
        raise UserError(
            "The tokenizer has no text to learn from: give it records with phrases, captions or transcripts."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            required_chars=PRINTABLE_ASCII,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD_TOKEN,
            unk_piece=UNK_TOKEN,
            bos_piece=BOS_TOKEN,
            eos_piece=EOS_TOKEN,
            user_defined_symbols=list(MARKERS),
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"The tokenizer cannot be trained with vocab_size={vocab_size}: {error}") from error
    return model.getvalue()
