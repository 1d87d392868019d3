"""The one exception that means "the user can mend this", and what becomes of other libraries' ones."""

from huggingface_hub.errors import StrictDataclassError

# What transformers raises for files that it cannot read or that hold something else.
CANNOT_OPEN = (OSError, ValueError, StrictDataclassError)


class UserError(ValueError):
    """A mistake in the user's input: one sentence that says what is wrong, where, and what to do.

    The command prints the sentence alone and exits with status 1; every other exception is a bug and keeps its
    traceback.
    """


def in_one_line(error: Exception) -> str:
    """The message of a library's exception on one line, ended with a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if isinstance(error, StrictDataclassError) else lines[:1])
    return text if text.endswith(".") else text + "."
