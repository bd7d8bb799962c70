"""Which of a model's voices a request means. Pure.

Above: the engine. Many clients know OpenAI's voices only and cannot be told others, or send one of them unless told
otherwise. A model with one voice answers to all of those names; one with several does not, for they would be a lie.
"""

from __future__ import annotations

from collections.abc import Sequence

from hostler.errors import InvalidRequest

OPENAI_VOICES = frozenset(
    ("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse")
)
DEFAULT = "default"
"""Means the first voice of any model."""

_MAX_TOLD = 40


def choose_voice(voices: Sequence[str], asked: str) -> int:
    """Return the index of the voice that `asked` means; empty or "default" means the first.

    Raises:
        InvalidRequest: it means none; lists those that there are.
    """
    name = asked.casefold()
    if not name or asked in voices:
        return voices.index(asked) if name else 0
    folded = [voice.casefold() for voice in voices]
    if name in folded:
        return folded.index(name)
    if name == DEFAULT or (len(voices) == 1 and name in OPENAI_VOICES):
        return 0
    told = ", ".join(voices[:_MAX_TOLD]) + (f" and {len(voices) - _MAX_TOLD} more" if len(voices) > _MAX_TOLD else "")
    raise InvalidRequest(f"This model has no voice {asked[:60]!r}. Its voices are: {told}.", param="voice")
