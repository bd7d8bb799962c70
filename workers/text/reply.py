"""One reply from tokens to events: text, stop strings, reasoning, tool calls, and the grammar that it must follow.

Above: `sequence.py`, which passes on every sampled token in the engine's thread. Below: detokenizer, parsers of
`formats/`, stop matcher, guide. `reply_plan.py` decides what a reply is made of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from workers.engine import (
    Event,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from workers.text.detokenizer import Decode, Detokenizer
from workers.text.formats.parser import CallParser
from workers.text.formats.pieces import Arguments, CallEnd, CallStart, Content, Piece, Thought
from workers.text.formats.reasoning import ThoughtSplitter
from workers.text.grammar import Guide
from workers.text.stops import StopMatcher


class ReplyParser(Protocol):
    """Parts the text of one reply into pieces, whatever the cuts it arrives in."""

    @property
    def thinking(self) -> bool:
        """Whether the text pushed last was reasoning."""

    def push(self, text: str) -> list[Piece]:
        """Take new text; return what is certain now."""

    def finish(self) -> list[Piece]:
        """The reply is over: return what was held back."""


class PlainParser:
    """Everything is content."""

    thinking = False

    def push(self, text: str) -> list[Piece]:
        """Return the text."""
        return [Content(text)] if text else []

    def finish(self) -> list[Piece]:
        """Return nothing: nothing was held back."""
        return []


class MarkedParser:
    """Thoughts first, where the model has them, then content and calls, where tools may be called."""

    def __init__(self, thoughts: ThoughtSplitter | None, calls: CallParser | None) -> None:
        self._thoughts = thoughts
        self._calls = calls

    @property
    def thinking(self) -> bool:
        """Whether the reply is inside its thoughts."""
        return self._thoughts is not None and self._thoughts.thinking

    def push(self, text: str) -> list[Piece]:
        """Take new text; return what is certain now."""
        return self._parted(self._thoughts.push(text) if self._thoughts else [Content(text)])

    def finish(self) -> list[Piece]:
        """The reply is over: return what was held back."""
        pieces = self._parted(self._thoughts.finish()) if self._thoughts else []
        return pieces + (self._calls.finish() if self._calls else [])

    def _parted(self, pieces: Sequence[Piece]) -> list[Piece]:
        if self._calls is None:
            return list(pieces)
        out: list[Piece] = []
        for piece in pieces:
            out.extend(self._calls.push(piece.text) if isinstance(piece, Content) else [piece])
        return out


class Reply:
    """The reply of one request. Used by the engine's thread alone.

    Args:
        decode: ids to text; keeps the markers that the parser needs.
        parser: parts the text.
        stops: texts that end the reply; looked for in the content only.
        max_tokens: most tokens to generate.
        guide: the grammar that every token must follow.
        new_call_id: makes ids of calls.
        single_call: the reply ends after its first call.
        budget_tokens: most tokens of reasoning; then `close_ids` are forced.
        close_ids: tokens that end the thoughts.

    Attributes:
        is_plain: it ends by its number of tokens or a token that ends replies, by nothing that it says.
        finish_reason: "stop", "length" or "tool_calls"; set once.
        num_reasoning_tokens: tokens spent on reasoning.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        max_tokens: int,
        parser: ReplyParser | None = None,
        stops: tuple[str, ...] = (),
        guide: Guide | None = None,
        new_call_id: Callable[[], str] = str,
        single_call: bool = False,
        budget_tokens: int | None = None,
        close_ids: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(decode)
        self._parser = parser or PlainParser()
        self._stops = StopMatcher(stops)
        self._max_tokens = max_tokens
        self._new_call_id = new_call_id
        self._single_call = single_call
        self._budget_tokens = budget_tokens
        self._close_ids = close_ids
        self._forced: deque[int] = deque()
        self._pending_logprobs: list[TokenLogprob] = []
        self._num_tokens = 0
        self._num_calls = 0
        self.guide = guide
        self.is_plain = guide is None and budget_tokens is None and not stops and isinstance(self._parser, PlainParser)
        self.finish_reason: str | None = None
        self.num_reasoning_tokens = 0
        self._force_if_spent()

    @property
    def stop(self) -> str:
        """The stop string that ended the reply, or empty."""
        return self._stops.matched or ""

    @property
    def forced_token(self) -> int | None:
        """The token that must come next whatever was sampled, if there is one; asked when the mask is there."""
        if not self._forced:
            return None
        # In the middle of a character no grammar lets a mark through: a token or two later it does.
        if self.guide is not None and not self.guide.permits(self._forced[0]):
            return None
        return self._forced[0]

    def accept(self, token_id: int, *, is_eos: bool, logprob: TokenLogprob | None) -> list[Event]:
        """Take one token, in order; decide whether the reply ends; return what it brought.

        Raises:
            Internal: the token was not allowed by the grammar.
        """
        self._num_tokens += 1
        if logprob is not None:
            self._pending_logprobs.append(logprob)
        if self._forced and self._forced[0] == token_id:
            self._forced.popleft()
        if self.guide is not None:
            self.guide.accept(token_id)
        was_thinking = self._parser.thinking
        text = "" if is_eos else self._detokenizer.push(token_id)
        ends = is_eos or (self.guide is not None and self.guide.stopped)
        cut = not ends and self._num_tokens >= self._max_tokens
        if ends or cut:
            text += self._detokenizer.flush()
        pieces = self._parser.push(text)
        if was_thinking or self._parser.thinking:
            self.num_reasoning_tokens += 1
        if ends or cut:
            pieces += self._parser.finish()
        events = self._events(pieces)
        if self.finish_reason is None and (ends or cut):
            self._say(self._stops.flush(), events)
            self.finish_reason = "length" if cut else "tool_calls" if self._num_calls else "stop"
        self._attach_logprobs(events)
        self._force_if_spent()
        return events

    def _events(self, pieces: Sequence[Piece]) -> list[Event]:
        """Turn pieces into events, up to whatever ends the reply."""
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, Content):
                self._say(self._stops.push(piece.text), events)
                if self._stops.matched is not None:
                    self.finish_reason = "tool_calls" if self._num_calls else "stop"
                    break
            elif isinstance(piece, Thought):
                events.append(ReasoningDelta(piece.text))
            elif isinstance(piece, CallStart):
                self._say(self._stops.flush(), events)
                events.append(ToolCallStart(self._num_calls, self._new_call_id(), piece.name))
                self._num_calls += 1
            elif isinstance(piece, Arguments):
                events.append(ToolCallArguments(self._num_calls - 1, piece.json))
            elif isinstance(piece, CallEnd):
                events.append(ToolCallEnd(self._num_calls - 1))
                if self._single_call:
                    self.finish_reason = "tool_calls"
                    break
        return events

    @staticmethod
    def _say(text: str, events: list[Event]) -> None:
        if text:
            events.append(TextDelta(text))

    def _attach_logprobs(self, events: list[Event]) -> None:
        """Give the gathered logprobs to the text of this token; those of reasoning and calls go nowhere."""
        if not self._pending_logprobs:
            return
        at = next((i for i, event in enumerate(events) if isinstance(event, TextDelta)), None)
        if at is not None:
            events[at] = TextDelta(events[at].text, tuple(self._pending_logprobs))  # type: ignore[union-attr]
        elif self.finish_reason is not None and not self._parser.thinking and not self._num_calls:
            events.append(TextDelta("", tuple(self._pending_logprobs)))
        elif not events and not self._parser.thinking:
            return  # held back: may still become text
        self._pending_logprobs.clear()

    def _force_if_spent(self) -> None:
        spent = self._budget_tokens is not None and self.num_reasoning_tokens >= self._budget_tokens
        if spent and self._parser.thinking and not self._forced and self.finish_reason is None:
            self._forced.extend(self._close_ids)
