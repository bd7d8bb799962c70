"""What one window's tokens say, and when. Pure; above: `engine.py`, `decoding.py`. Seconds from the window's beginning.

Segments are Whisper's own: what it says between two times. The tests of quality and their bounds are those of Whisper's
own decoding (github.com/openai/whisper, `transcribe.py`, MIT).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from workers.hearing.vocabulary import TIME_STEP_S

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Tried in turn while the result looks wrong."""
MAX_COMPRESSION_RATIO = 2.4
MIN_AVG_LOGPROB = -1.0
MIN_NO_SPEECH_PROB = 0.6


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the model made of one window.

    Attributes:
        tokens: text and times as said, the end not among them.
        logprobs: of `tokens`, and of the end where it was said.
        text: of all tokens.
        no_speech_prob: that nobody speaks; 0 for models that do not tell.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    temperature: float
    no_speech_prob: float

    @property
    def avg_logprob(self) -> float:
        """Mean logprob of a token."""
        return sum(self.logprobs) / (len(self.tokens) + 1)

    @property
    def compression_ratio(self) -> float:
        """How well the text compresses: what repeats itself does."""
        return compression_ratio(self.text)

    @property
    def is_silence(self) -> bool:
        """The model says so, and what it wrote is unlikely, too."""
        return self.no_speech_prob > MIN_NO_SPEECH_PROB and self.avg_logprob < MIN_AVG_LOGPROB

    @property
    def looks_wrong(self) -> bool:
        """It repeats itself or is unlikely: another temperature may do better."""
        if self.is_silence:
            return False
        return self.compression_ratio > MAX_COMPRESSION_RATIO or self.avg_logprob < MIN_AVG_LOGPROB


def compression_ratio(text: str) -> float:
    """Return bytes of a text over its compressed bytes."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data)) if data else 0.0


@dataclass(frozen=True, slots=True)
class Stretch:
    """A segment of a window: `tokens[first:last]` are its words' and times' tokens, `words` the words' alone."""

    start_s: float
    end_s: float
    tokens: tuple[int, ...]
    words: tuple[int, ...]
    indices: tuple[int, ...]


def stretches_of(tokens: Sequence[int], first_time: int, end: int, duration_s: float) -> list[Stretch]:
    """Return the segments of one window in order; times lie within it and never go back.

    Args:
        tokens: as said, without the end of text.
        first_time: the token of time 0; lower ones are words.
        end: tokens from here to `first_time` say nothing.
        duration_s: of the window.
    """
    found: list[Stretch] = []
    start_s = 0.0
    held: list[int] = []
    words: list[int] = []
    indices: list[int] = []

    def close(end_s: float) -> None:
        nonlocal held, words, indices
        if words:
            began = min(start_s, duration_s)
            found.append(Stretch(began, min(max(end_s, began), duration_s), tuple(held), tuple(words), tuple(indices)))
        held, words, indices = [], [], []

    for index, token in enumerate(tokens):
        if token < first_time:
            held.append(token)
            if token < end:
                words.append(token)
                indices.append(index)
            continue
        at_s = (token - first_time) * TIME_STEP_S
        if words:
            held.append(token)
            close(at_s)
            start_s = at_s
        else:
            held, start_s = [token], at_s
    close(duration_s)
    return found
