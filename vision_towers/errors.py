"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in the user's input: one sentence that says what is wrong, where, and what to do.

    The command prints the sentence alone and exits with status 1; every other exception is a bug and keeps its
    traceback.
    """
