"""Which waiting windows join the rows that run. Pure; above: `engine.py`.

A recording's first window joins at once and, while it runs, no later one does: somebody waits for the first words, and
the recording's language is known only then. The others join when half of the rows are free, so that the decoder works
on many rows, a few at a time, so that rows which run do not wait long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A window that waits: which recording it is of, its number in it, and whether its language is known."""

    recording: int
    index: int
    is_ready: bool


def choose_joining(
    waiting: Sequence[Waiting], *, num_running: int, num_first_running: int, num_rows: int, at_most: int
) -> list[int]:
    """Return the positions in `waiting` of those that join now.

    Args:
        waiting: in order of arrival.
        num_running: rows in use.
        num_first_running: how many of them are their recording's first.
        num_rows: all rows.
        at_most: so many join at once.
    """
    room = min(num_rows - num_running, at_most)
    if room <= 0:
        return []
    first = [place for place, window in enumerate(waiting) if window.index == 0]
    if first:
        return first[:room]
    if num_first_running or 2 * num_running > num_rows:
        return []
    ready = [place for place, window in enumerate(waiting) if window.is_ready]
    # Recordings go on side by side, whoever came first.
    ready.sort(key=lambda place: (waiting[place].index, place))
    return ready[:room]
