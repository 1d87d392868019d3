"""English plurals, for questions such as "How many wine glasses are there?"."""

IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "snowman": "snowmen",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "knife": "knives",
    "leaf": "leaves",
    "wolf": "wolves",
    "shelf": "shelves",
    "loaf": "loaves",
    "half": "halves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "hero": "heroes",
    "cactus": "cacti",
}
UNCHANGED = frozenset(
    {"aircraft", "broccoli", "deer", "fish", "glasses", "grass", "jeans", "pants", "scales", "scissors", "series"}
    | {"sheep", "shorts", "skis"}
)


def plural(noun: str) -> str:
    """`"wine glass"` -> `"wine glasses"`: the last word of `noun` in the plural, the rest as it is."""
    head, _, last = noun.rpartition(" ")
    return f"{head} {_plural_word(last)}" if head else _plural_word(last)


def _plural_word(word: str) -> str:
    lower = word.lower()
    if lower in UNCHANGED:
        return word
    if lower in IRREGULAR:
        return word[0] + IRREGULAR[lower][1:]
    if lower.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if lower.endswith("y") and lower[-2:-1] not in tuple("aeiou"):
        return word[:-1] + "ies"
    return word + "s"
