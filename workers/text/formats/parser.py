"""Finds tool calls in a reply's text as it arrives, in whatever pieces. Above: `reply.py`. Below: bodies.

Text outside calls is content and leaves at once, except a tail that may begin a call and white space, which is dropped
where it only separates calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workers.text.formats.body import Body
from workers.text.formats.json_call import JsonCall
from workers.text.formats.pieces import CallEnd, CallStart, Content, Piece, Tools, first_marker, possible_start
from workers.text.formats.pythonic_call import PythonicCalls

_FENCES = ("```json", "```")


@dataclass(frozen=True, slots=True)
class Opener:
    """A marker that opens a call, and what stands behind it: `body(tools, marker)`."""

    marker: str
    body: Callable[[Tools, str], Body]


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """What the parser looks for.

    Attributes:
        openers: markers of calls.
        ignored: markers around several calls; dropped.
        bare_json: a reply that begins with a JSON object, fenced or not, may be a call.
        bare_list: a reply that begins with `[` may be calls in Python's notation.
    """

    openers: tuple[Opener, ...]
    ignored: tuple[str, ...] = ()
    bare_json: bool = False
    bare_list: bool = False


class CallParser:
    """Splits one reply into content and calls.

    Args:
        syntax: how this model writes calls.
        tools: what may be called, by name.
        allow_bare: whether calls without markers count.
    """

    def __init__(self, syntax: CallSyntax, tools: Tools, *, allow_bare: bool = True) -> None:
        self._syntax = syntax
        self._tools = tools
        self._bare_json = allow_bare and syntax.bare_json
        self._bare_list = allow_bare and syntax.bare_list
        self._bodies = {opener.marker: opener.body for opener in syntax.openers}
        self._markers = (*self._bodies, *syntax.ignored)
        self._body: Body | None = None
        self._body_is_bare = False
        self._buffer = ""
        self._space = ""
        self._may_be_bare = self._bare_json or self._bare_list
        self._called = False

    def push(self, text: str) -> list[Piece]:
        """Take new text; return what is certain now."""
        found: list[Piece] = []
        self._buffer += text
        while self._advance(found):
            pass
        return self._settle(found)

    def finish(self) -> list[Piece]:
        """The reply is over: return what was held back."""
        found: list[Piece] = []
        if self._body is not None:
            self._body.finish(found)
            self._body = None
        else:
            found.append(Content(self._buffer))
        self._buffer = ""
        pieces = self._settle(found)
        if self._space and not self._called:
            pieces.append(Content(self._space))
        return pieces

    def _advance(self, found: list[Piece]) -> bool:
        """Work on the buffer; False when more text is needed."""
        if self._body is not None:
            text, self._buffer = self._buffer, ""
            before = len(found)
            rest = self._body.feed(text, found)
            self._note(found[before:])
            if rest is None:
                return False
            self._buffer, self._body = rest, None
            self._may_be_bare = self._may_be_bare and self._body_is_bare
            return bool(rest)
        if self._may_be_bare and (decided := self._look_for_bare()) is not None:
            return decided
        hit = first_marker(self._buffer, self._markers)
        # A marker that is the beginning of a longer one, and could still become it, waits.
        if hit is not None and not self._could_grow(self._buffer[hit[0] :], hit[1]):
            at, marker = hit
            self._say(found, self._buffer[:at])
            self._buffer = self._buffer[at + len(marker) :]
            if marker in self._bodies:
                self._open(self._bodies[marker](self._tools, marker), bare=False)
            return True
        safe = len(self._buffer) - possible_start(self._buffer, self._markers) if hit is None else hit[0]
        self._say(found, self._buffer[:safe])
        self._buffer = self._buffer[safe:]
        return False

    def _could_grow(self, tail: str, marker: str) -> bool:
        return any(other != marker and other.startswith(tail) for other in self._markers)

    def _open(self, body: Body, *, bare: bool) -> None:
        self._body, self._body_is_bare = body, bare
        if not bare:
            self._may_be_bare = False

    def _look_for_bare(self) -> bool | None:
        """At the reply's beginning, or behind a bare call: True opened one, False waits, None: no bare call here."""
        stripped = self._buffer.lstrip(" \t\r\n;" if self._called else None)
        lead = self._buffer[: len(self._buffer) - len(stripped)]
        if not stripped:
            return False
        for fence in _FENCES if self._bare_json else ():
            if stripped.startswith(fence):
                inside = stripped[len(fence) :].lstrip()
                if inside.startswith("{"):
                    head = stripped[: len(stripped) - len(inside)]
                    self._buffer = inside
                    self._open(JsonCall(self._tools, lead + head, ("```",)), bare=True)
                    return True
                if not inside or _FENCES[0].startswith(stripped):
                    return False
            elif fence.startswith(stripped):
                return False
        if self._bare_json and stripped[0] == "{":
            self._buffer = stripped
            self._open(JsonCall(self._tools, lead), bare=True)
            return True
        if self._bare_list and stripped[0] == "[":
            self._buffer = stripped[1:]
            self._open(PythonicCalls(self._tools, lead + "[", end="]"), bare=True)
            return True
        self._may_be_bare = False
        return None

    def _say(self, found: list[Piece], text: str) -> None:
        if text:
            found.append(Content(text))

    def _note(self, pieces: list[Piece]) -> None:
        if any(isinstance(piece, CallEnd) for piece in pieces):
            self._called = True
        if any(isinstance(piece, Content) for piece in pieces):
            self._may_be_bare = False

    def _settle(self, found: list[Piece]) -> list[Piece]:
        """Hold white space back until something follows it; drop it beside calls."""
        pieces: list[Piece] = []
        for piece in found:
            if isinstance(piece, CallStart):
                self._space = ""
            if not isinstance(piece, Content):
                pieces.append(piece)
                continue
            text = self._space + piece.text
            kept = text.rstrip()
            self._space = text[len(kept) :]
            if kept:
                pieces.append(Content(kept))
        return pieces
