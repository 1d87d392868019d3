"""The phrases of a caption that are looked for in its image (CLOC, arXiv 2410.02746, Sec. 4 and App. C)."""

from __future__ import annotations

from collections.abc import Iterable

from .taggers import Tagger

GRAMMAR = "NP: {<DT>?<JJ.*>*<NN.*>+}"  # an optional determiner, any adjectives, one or more nouns

_WEB = """alamy background backgrounds clipart closeup download depositphotos dreamstime gettyimages getty hd icon
illustration illustrations image images isolated istock istockphoto jpeg jpg logo photo photograph photographs
photography photos pic pics picture pictures png royalty scene shot shutterstock stock template thumbnail vector
vectors video view wallpaper wallpapers website"""
_STOP = """a about above after again all also am an and another any anything are around as at back be because been
before behind being below beside between both bottom but by can center could did do does doing don down during each
either else etc every everything few first for from front further had has have having he her here hers him his how i if
in into is it its itself just kind left lot lots many may me middle might more most much must my next no none nor not
nothing now number of off on one ones only onto or other others our out over own part right s same she should side so
some something such t than that the their them then there these they thing things this those three through to too top
total towards two type under until up us use variety very was way we well were what when where which while who whom
whose why will with within without would you your"""

WEB_WORDS = frozenset(_WEB.split())
"""Words of the web, not of things. The paper takes OWLv2's list; this one is ours."""
STOP_WORDS = frozenset(_STOP.split())
"""Chunks of these alone are dropped: a tagger may take them for nouns. The paper takes NLTK's list, which is data to be
downloaded; this one is ours."""


def noun_phrases(captions: Iterable[str], tagger: Tagger, limit: int = 20) -> list[str]:
    """The first `limit` different noun phrases of the captions, in their order, lower case."""
    from nltk import RegexpParser, word_tokenize

    chunker = RegexpParser(GRAMMAR)
    phrases: dict[str, None] = {}
    for caption in captions:
        # Not cut into sentences, which would need data: a full stop ends a chunk anyway.
        words = [word for word in word_tokenize(caption.lower(), preserve_line=True) if word not in WEB_WORDS]
        tagged = tagger(words)
        if not tagged:
            continue
        for chunk in chunker.parse(tagged).subtrees(lambda tree: tree.label() == "NP"):  # pyright: ignore
            found = [word for word, _ in chunk.leaves()]
            if any(word not in STOP_WORDS and any(map(str.isalnum, word)) for word in found):
                phrases.setdefault(" ".join(found))
    return list(phrases)[:limit]
