"""The words that signs show: `SEEN_WORDS` for training and evaluation, `UNSEEN_WORDS` for evaluation alone.

Common lower-case English words of 3 to 6 letters. No word is also a category, a colour or a word of the phrase grammar,
so that a transcript is never mistaken for a description.
"""

from .errors import user_error

SEEN_WORDS: tuple[str, ...] = tuple(
    """
    acid actor adult agent alarm album apple army artist atlas aunt award baby bacon badge baker banana band bank barn
    basket beach bear beard bench berry bike bird blade board boat bone book boot border bottle bowl box branch bread
    breeze bridge broom brush bubble bucket butter button cabin cable cactus cake camel camera camp candle candy canoe
    car card carpet castle chain chair cheese cherry circle city clay clock cloth coach coast coat cobra coin corn
    cotton couch cow crab cradle cream crowd dance desert desk dinner dish doctor dog dollar donkey door dragon dream
    drum duck eagle earth egg engine event fabric fairy family farm father fence field finger fire fish floor fog
    forest fork fox frog fruit garage garden gate ghost giant glass glove goat grape guitar hair hammer harbor hat hill
    honey horse hotel insect island jacket jar jelly jewel juice jump jungle kettle key kitten ladder lake lamp leaf
    lemon letter lion lunch magnet map maple market mask meadow melon metal milk mirror money motor mouse museum nest
    night novel nurse ocean office olive onion paint palace panda paper park peach pepper piano pig pillow pirate
    planet plate pocket potato prize puzzle quilt rabbit radio rain river robot rocket roof rope school shark sheep
    shelf ship shirt shoe singer soup spider spoon spring stone summer sweet table tiger ticket toast tomato tower
    train tree truck tunnel turtle valley velvet violin voice wagon wallet water whale wheat window winter wolf yacht
    yard yogurt zebra zipper
    """.split()  # noqa: SIM905 - a list literal of one word a line would hide the words
)

UNSEEN_WORDS: tuple[str, ...] = tuple(
    """
    ankle bakery barrel beetle bus canal carrot comet copper daisy diver eel feast ferry ginger grill helmet hippo
    igloo jeans koala lever lizard lobby mango muffin nickel oak otter oven pearl pigeon pond pump raft ribbon saddle
    salmon sofa statue swan temple thumb towel trophy turkey vase waiter walnut zoo
    """.split()  # noqa: SIM905 - a list literal of one word a line would hide the words
)

WORD_LISTS = {"seen": SEEN_WORDS, "unseen": UNSEEN_WORDS}


def word_list(name: str) -> tuple[str, ...]:
    """The words of list `name` ("seen" or "unseen"); raises UserError for any other name."""
    if name not in WORD_LISTS:
        raise user_error(f"There is no word list {name!r}: choose one of {', '.join(WORD_LISTS)}.")
    return WORD_LISTS[name]
