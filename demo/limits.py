"""How much one visitor may ask of the machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of the demo; what goes beyond one is refused in a sentence.

    Attributes:
        file_bytes: of an uploaded file.
        pixels: of a picture, read from its header before anything is decoded.
        kept_pixels: a larger picture is made smaller when it is opened; boxes are in pixels of what is kept.
        sessions: pictures kept at once; the one used longest ago goes first.
        idle_seconds: after which a session may be forgotten.
        marks: boxes and points on a picture.
        question_chars: of one question.
        turns: of one conversation.
        waiting: questions in the queue.
        at_once: questions answered at the same time; on a CPU more of them only make each slower.
        new_tokens: longest answer that can be chosen.
    """

    file_bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    kept_pixels: int = 12_000_000
    sessions: int = 64
    idle_seconds: float = 3600.0
    marks: int = 24
    question_chars: int = 1000
    turns: int = 60
    waiting: int = 64
    at_once: int = 2
    new_tokens: int = 512
