"""Whose turn it is. Pure.

Above: the engine. Fair queueing by the sound that was made: the request that has got least goes next, so that a long
text never holds up a short one by more than a piece, and many long ones advance alike. A request that arrives begins
where the hindmost of the others stands, so that newcomers cannot starve those who are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """A request that could use the model now.

    Attributes:
        arrival: rises from request to request.
        made_s: seconds of sound made for it so far, counted from `start_s`.
        is_full: its reader is behind, so it has to wait.
    """

    arrival: int
    made_s: float
    is_full: bool = False


def start_s(others: Sequence[Turn]) -> float:
    """Return what a newcomer is taken to have got already."""
    return min((turn.made_s for turn in others), default=0.0)


def next_turn(turns: Sequence[Turn], max_running: int) -> Turn | None:
    """Return who goes next of the first `max_running` to arrive; None when all of them wait for their readers."""
    running = sorted(turns, key=lambda turn: turn.arrival)[:max_running]
    return min((t for t in running if not t.is_full), key=lambda t: (t.made_s, t.arrival), default=None)
