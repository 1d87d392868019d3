"""Parts of speech (Penn Treebank's tags) without anything downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...vision_towers.errors import UserError

Tagger = Callable[[Sequence[str]], list[tuple[str, str]]]
_NLTK_DATA = "taggers/averaged_perceptron_tagger_eng"


def resolve_tagger(name: str) -> str:
    """ "auto" -> "nltk" where its perceptron's data is installed, else "textblob"; another name is checked.

    Raises:
        UserError: no such tagger, or it is not installed.
    """
    if name not in ("auto", "nltk", "textblob"):
        raise UserError(f"tagger must be auto, nltk or textblob; got {name!r}.")
    try:
        import nltk
        import textblob  # noqa: F401  (it brings nltk)
    except ImportError:
        raise UserError("phrases need nltk and textblob; pip install 'regiontower[label]'.") from None
    if name == "textblob":
        return name
    try:
        nltk.data.find(_NLTK_DATA)
        return "nltk"
    except LookupError:
        if name == "nltk":
            raise UserError(
                "nltk's perceptron tagger has no data here (averaged_perceptron_tagger_eng); install it with nltk's "
                "downloader, or use --tagger textblob."
            ) from None
        return "textblob"


def open_tagger(name: str) -> Tagger:
    """The tagger of a resolved name. "nltk": the averaged perceptron. "textblob": Pattern's lexicon and rules (Brill),
    which its wheel ships."""
    if name == "nltk":
        import nltk

        return lambda words: nltk.pos_tag(list(words))
    from textblob.en import tag

    return lambda words: tag(" ".join(words), tokenize=False) if words else []
