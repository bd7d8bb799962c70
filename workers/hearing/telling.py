"""What a recording's windows say → text and segments in order. Pure but for its counters; above: `engine.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from workers.engine import TextDelta, TokenLogprob
from workers.hearing.times import Decoded, Stretch, stretches_of
from workers.hearing.vocabulary import Vocabulary
from workers.hearing.words import split_words
from workers.transcription import Heard, Segment, Word


@dataclass(frozen=True, slots=True)
class HeardWindow:
    """One window, understood.

    Attributes:
        index: its number in the recording.
        start_s: in the recording.
        starts_s: when each of its words' tokens begins, from the window's beginning, and the end of the last one;
            None where nobody asked.
    """

    index: int
    start_s: float
    duration_s: float
    language: str
    decoded: Decoded
    starts_s: list[float] | None = None


class Teller:
    """Tells one recording's windows, which must come in order.

    Args:
        vocabulary: of the model.
        text_of: token ids → text.
        token_bytes: for logprobs; None where nobody asked.
        segments: tell them, too.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text_of: Callable[[Sequence[int]], str],
        *,
        token_bytes: Callable[[int], bytes] | None,
        segments: bool,
    ) -> None:
        self._vocabulary = vocabulary
        self._text_of = text_of
        self._token_bytes = token_bytes
        self._segments = segments
        self._num_segments = 0
        self._has_told = False
        self.num_tokens = 0

    def tell(self, window: HeardWindow) -> Iterator[Heard]:
        """Yield a window's text and then, where they are wanted, its segments. Silence says nothing."""
        decoded = window.decoded
        self.num_tokens += len(decoded.tokens)
        if decoded.is_silence or not decoded.text.strip():
            return
        text = decoded.text if self._has_told else decoded.text.lstrip()
        self._has_told = True
        yield TextDelta(text, self._logprobs(decoded))
        if self._segments:
            yield from self._told(window)

    def _logprobs(self, decoded: Decoded) -> tuple[TokenLogprob, ...]:
        if self._token_bytes is None:
            return ()
        return tuple(
            TokenLogprob(token, self._token_bytes(token), logprob)
            for token, logprob in zip(decoded.tokens, decoded.logprobs, strict=False)
            if token < self._vocabulary.end
        )

    def _told(self, window: HeardWindow) -> Iterator[Segment]:
        decoded = window.decoded
        first, end = self._vocabulary.first_time, self._vocabulary.end
        num_before = 0
        for stretch in stretches_of(decoded.tokens, first, end, window.duration_s):
            text = self._text_of(stretch.words)
            words: tuple[Word, ...] = ()
            if window.starts_s is not None:
                words = self._words(window, stretch, window.starts_s[num_before:])
            num_before += len(stretch.words)
            if not text.strip():
                continue
            start_s, end_s = stretch.start_s, stretch.end_s
            yield Segment(
                id=self._num_segments,
                start_s=window.start_s + start_s,
                end_s=window.start_s + end_s,
                text=text,
                token_ids=stretch.tokens,
                temperature=decoded.temperature,
                avg_logprob=decoded.avg_logprob,
                compression_ratio=decoded.compression_ratio,
                no_speech_prob=decoded.no_speech_prob,
                words=words,
            )
            self._num_segments += 1

    def _words(self, window: HeardWindow, stretch: Stretch, starts_s: list[float]) -> tuple[Word, ...]:
        """Return a stretch's words; what the path makes of pauses around it is cut to the stretch's own times."""
        found, place = [], 0
        for text, count in split_words(stretch.words, self._text_of, window.language):
            start_s = min(max(starts_s[place], stretch.start_s), stretch.end_s)
            end_s = max(start_s, min(starts_s[place + count], stretch.end_s))
            found.append(Word(text, window.start_s + start_s, window.start_s + end_s))
            place += count
        return tuple(found)
