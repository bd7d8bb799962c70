"""How models mark their thoughts, and the splitter that parts thoughts from the answer. Pure; used by `reply.py`."""

from __future__ import annotations

from dataclasses import dataclass

from workers.text.formats.pieces import Content, Piece, Thought, possible_start


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The texts around thoughts. Many templates write the opening one into the prompt themselves."""

    name: str
    open: str
    close: str


REASONING_FORMATS = (
    ReasoningFormat("think", "<think>", "</think>"),  # DeepSeek R1, Qwen3, QwQ, GLM 4.5, SmolLM3, MiniMax
    ReasoningFormat("magistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
    ReasoningFormat("kimi", "◁think▷", "◁/think▷"),
    ReasoningFormat("gemma4", "<|channel>thought\n", "<channel|>"),
    ReasoningFormat("reasoning", "<reasoning>", "</reasoning>"),
)


def detect_reasoning(template: str) -> ReasoningFormat | None:
    """Return the format that a chat template speaks of; None when it has no thoughts."""
    return next((f for f in REASONING_FORMATS if f.close in template and f.open.strip() in template), None) or next(
        (f for f in REASONING_FORMATS if f.close in template), None
    )


class ThoughtSplitter:
    """Parts one reply into thoughts and the rest. Thoughts come first or not at all.

    Args:
        format: the marks.
        opened: the prompt has opened the thoughts already.

    Attributes:
        thinking: whether the text fed last was inside thoughts.
        over: no thoughts can follow.
    """

    def __init__(self, format: ReasoningFormat, *, opened: bool) -> None:
        self._format = format
        self.thinking = opened
        self.over = False
        self._buffer = ""
        self._trim = opened

    def push(self, text: str) -> list[Piece]:
        """Take new text; return what is certain now. Once `over`, `Content` is everything that follows."""
        if self.over and not self._trim:
            return [Content(text)] if text else []
        self._buffer += text
        if not self.thinking and not self.over:
            stripped = self._buffer.lstrip()
            if not stripped or (self._format.open.startswith(stripped) and stripped != self._format.open):
                return []
            if not stripped.startswith(self._format.open):
                self.over = True
                return self._release(Content)
            self._buffer = stripped[len(self._format.open) :]
            self.thinking = self._trim = True
        pieces: list[Piece] = []
        if self.thinking:
            self._trim_left()
            at = self._buffer.find(self._format.close)
            if at < 0:
                keep = self._unsure_tail()
                text, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
                return [Thought(text)] if text else []
            if thought := self._buffer[:at].rstrip():
                pieces.append(Thought(thought))
            self._buffer = self._buffer[at + len(self._format.close) :]
            self.thinking, self.over, self._trim = False, True, True
        self._trim_left()
        return pieces + self._release(Content)

    def finish(self) -> list[Piece]:
        """The reply is over: return what was held back."""
        return self._release(Thought if self.thinking else Content)

    def _trim_left(self) -> None:
        if self._trim:
            self._buffer = self._buffer.lstrip()
            self._trim = not self._buffer

    def _unsure_tail(self) -> int:
        """Length of the tail that may belong to the closing mark or be white space before it."""
        mark = possible_start(self._buffer, (self._format.close,))
        head = self._buffer[: len(self._buffer) - mark]
        return mark + len(head) - len(head.rstrip())

    def _release(self, kind: type[Thought] | type[Content]) -> list[Piece]:
        text, self._buffer = self._buffer, ""
        return [kind(text)] if text else []
