"""The user's error, made without importing the towers until there is one: scenes need no torch."""


def user_error(sentence: str) -> ValueError:
    """A `vision_towers.errors.UserError` that says `sentence`. That package imports torch, which takes seconds that
    neither `regiontower scenes` nor its second process has to spend."""
    from ...vision_towers.errors import UserError

    return UserError(sentence)
