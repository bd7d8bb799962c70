"""Stop strings across token borders: hold back what might become one, trim what did.

Pure; used by `sequence.py` for each request.
"""

from __future__ import annotations


class StopMatcher:
    """Feed text, get what is safe to send.

    Args:
        stops: non-empty strings that end the reply and are not part of it.
    """

    __slots__ = ("_held", "_longest", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max((len(s) for s in stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take new text; return the part that no stop string can begin in. Sets `matched` when one appears."""
        if not self._stops:
            return text
        window = self._held + text
        first = min(
            ((at, -len(stop), stop) for stop in self._stops if (at := window.find(stop)) >= 0),
            default=None,
        )
        if first is not None:
            self.matched, self._held = first[2], ""
            return window[: first[0]]
        keep = self._prefix_at_end(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep]

    def flush(self) -> str:
        """Return what was held back: the reply ended and it was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _prefix_at_end(self, window: str) -> int:
        """Length of the longest tail of `window` that begins some stop string."""
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            tail = window[len(window) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
