"""Draws a growing markdown text on a terminal. Above stands `cli.chat`; below, rich.

What is complete (paragraphs, closed code blocks) is printed once and scrolls away like any output; only the
unfinished end is redrawn. So a long reply costs no more than a short one, and nothing is drawn twice.
"""

from __future__ import annotations

import time

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

_REDRAW_S = 0.06


def split_complete(text: str) -> tuple[str, str]:
    """Return (blocks that can no longer change, the rest). Splits at the last blank line outside a code fence."""
    fence: str | None = None
    end = position = 0
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if fence is None and stripped.startswith(("```", "~~~")):
            fence = stripped[:3]
        elif fence is not None and stripped.startswith(fence):
            fence = None
        position += len(line)
        # A list or a table may go on after a blank line, yet drawing it in two parts looks the same.
        if fence is None and not stripped and line.endswith("\n"):
            end = position
    return text[:end], text[end:]


class _LastLines:
    """The end of a renderable, as much of it as fits the terminal."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Markdown(self._text), options, pad=False)
        for line in lines[-max(3, console.height - 3) :]:
            yield from line
            yield Segment.line()


class MarkdownStream:
    """Use as a context manager around one reply; `text` and `reasoning` add to it, `waiting` says why not yet."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(Spinner("dots", style="cyan"), console=console, transient=True, refresh_per_second=15)
        self._pending = ""
        self._reasoning = ""
        self._drawn_at = 0.0

    def __enter__(self) -> MarkdownStream:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_reasoning()
        self._live.update(Text())
        self._live.stop()
        if self._pending.strip():
            self._console.print(Markdown(self._pending))

    def waiting(self, what: str) -> None:
        """Tell beside the spinner what the reply waits for."""
        self._live.update(Spinner("dots", text=Text(what, style="dim"), style="cyan"))

    def text(self, piece: str) -> None:
        """Add to the answer."""
        self._end_reasoning()
        self._pending += piece
        complete, rest = split_complete(self._pending)
        if complete.strip():
            self._live.update(Text())
            self._live.console.print(Markdown(complete))
            self._live.console.print()
            self._pending = rest.lstrip("\n")
        self._draw(_LastLines(self._pending))

    def reasoning(self, piece: str) -> None:
        """Add to what the model thinks before it answers."""
        self._reasoning += piece
        *lines, self._reasoning = self._reasoning.split("\n")
        for line in lines:
            self._live.console.print(Text(line, style="dim italic"))
        self._draw(Text(self._reasoning, style="dim italic"))

    def _end_reasoning(self) -> None:
        if self._reasoning.strip():
            self._live.console.print(Text(self._reasoning, style="dim italic"))
            self._live.console.print()
        self._reasoning = ""

    def _draw(self, what: _LastLines | Text) -> None:
        now = time.monotonic()
        if now - self._drawn_at >= _REDRAW_S:
            self._drawn_at = now
            self._live.update(what, refresh=False)
