"""The part of a reply behind a call's opening marker. Above: `parser.py`. Below: a module for each way to write calls.

A body is fed text until it says that it is over. Until a call is surely one of an offered tool nothing is sent; what
turns out to be no call comes back whole as content. After that, arguments are sent as they arrive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from workers.text.formats.pieces import Arguments, CallEnd, CallStart, Content, Piece, Tools, possible_start

MAX_HEADER_CHARS = 512


class Body(ABC):
    """Base of all bodies; subclasses implement `_step`.

    Args:
        tools: what may be called, by name.
        opener: the text before it, given back when it is no call after all.
        closers: optional texts after a call, in order; swallowed.
    """

    def __init__(self, tools: Tools, opener: str, closers: tuple[str, ...] = ()) -> None:
        self._tools = tools
        self._closers = closers
        self._out: list[Piece] = []
        self._buffer = ""
        self._withheld = opener
        self._started = False
        self._over = False
        self._closing: list[str] | None = None

    def feed(self, text: str, out: list[Piece]) -> str | None:
        """Take text, append pieces to `out`; return the text after the body once it is over, else None."""
        self._out = out
        self._buffer += text
        while not self._over:
            if self._closing is not None:
                self._close()
                if self._closing is not None:
                    return None
            elif not self._step():
                return None
        rest, self._buffer = self._buffer, ""
        return rest

    def finish(self, out: list[Piece]) -> None:
        """The reply ended inside the body."""
        self._out = out
        if self._closing is not None or self._over:
            return
        self._at_end()
        if not self._over and self._closing is None:
            self._fail()
            if self._buffer:
                out.append(Content(self._buffer))
                self._buffer = ""

    @abstractmethod
    def _step(self) -> bool:
        """Consume from `_buffer`; False when more text is needed."""

    def _at_end(self) -> None:
        """The reply ends: settle what only the end could settle. Most ways to write calls have nothing to settle."""
        return

    def _take(self, count: int) -> str:
        """Consume `count` characters; they are kept back until a call has started."""
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        if not self._started:
            self._withheld += taken
        return taken

    def _start(self, name: str) -> None:
        self._started = True
        self._withheld = ""
        self._out.append(CallStart(name))

    def _arguments(self, json: str) -> None:
        if json:
            self._out.append(Arguments(json))

    def _end(self, *, more: bool = False) -> None:
        """A call is complete; `more`: others may follow inside this body, else only the closers."""
        self._out.append(CallEnd())
        self._started = False
        if not more:
            self._closing = list(self._closers)

    def _fail(self) -> None:
        """It is no call, or stopped being one: nothing is lost, the rest is content."""
        if self._started:
            self._out.append(CallEnd())
        elif self._withheld:
            self._out.append(Content(self._withheld))
        self._withheld = ""
        self._started = False
        self._over = True

    def _close(self) -> None:
        closing = self._closing or []
        while closing:
            stripped = self._buffer.lstrip()
            if stripped.startswith(closing[0]):
                self._buffer = stripped[len(closing[0]) :]
                closing.pop(0)
            elif not stripped or possible_start(stripped, closing) == len(stripped):
                return
            else:
                closing.pop(0)
        self._over = True
        self._closing = None
