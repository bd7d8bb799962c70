"""How effects end: at once, late, never, with an error, by the death of the process. Drawn anew for each.

Above it: the effects. Below it: a source of chance, which the walk seeds anew for every step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum

from hostler.errors import InvalidRequest, ModelLoadFailed, OutOfMemory, Unavailable, WorkerLost


class Fate(Enum):
    """What becomes of one effect."""

    WELL = "well"
    FAILS = "fails"
    DIES = "dies"
    FREEZES = "freezes"
    NEVER = "never"


_WEIGHTS: dict[str, tuple[float, float, float, float]] = {
    # Chance of: failing, dying, freezing, never ending. What is left goes well.
    "spawn": (0.08, 0.0, 0.0, 0.02),
    "load": (0.10, 0.05, 0.03, 0.01),
    "sleep": (0.08, 0.04, 0.02, 0.005),
    "wake": (0.12, 0.05, 0.03, 0.01),
    "resize": (0.15, 0.03, 0.02, 0.01),
    "drain": (0.05, 0.03, 0.02, 0.005),
    "unload": (0.05, 0.05, 0.02, 0.0),
    "kill": (0.05, 0.0, 0.0, 0.0),
    "locate": (0.05, 0.0, 0.0, 0.0),
    "fetch": (0.2, 0.0, 0.0, 0.0),
    "list": (0.1, 0.0, 0.0, 0.0),
    "find": (0.0, 0.0, 0.0, 0.0),
    "measure": (0.0, 0.0, 0.0, 0.0),
}
_LATE_S: dict[str, float] = {"load": 15.0, "fetch": 30.0, "drain": 1.0, "kill": 4.0}

_Errors = tuple[tuple[type[Exception], str], ...]
_ERRORS: dict[str, _Errors] = {
    "load": (
        (OutOfMemory, "out of memory"),
        (Unavailable, "try again"),
        (RuntimeError, "a bug"),
        (ModelLoadFailed, "truncated weights"),
        (InvalidRequest, "no such dtype"),
    ),
    "fetch": ((ModelLoadFailed, "no such repository"), (Unavailable, "the disk is full")),
    "list": ((Unavailable, "the store cannot be read"),),
    "locate": ((Unavailable, "the store cannot be read"), (InvalidRequest, "damaged files")),
}
_ANY_ERRORS: _Errors = ((Unavailable, "not now"), (WorkerLost, "the connection broke"), (RuntimeError, "a bug"))


@dataclass(slots=True)
class Fates:
    """Draws fates.

    Attributes:
        chance: where they come from.
        calm: everything goes well, and soon.
    """

    chance: random.Random
    calm: bool = False

    def of(self, effect: str) -> Fate:
        """Return what becomes of an effect that begins now."""
        if self.calm:
            return Fate.WELL
        drawn = self.chance.random()
        for fate, weight in zip((Fate.FAILS, Fate.DIES, Fate.FREEZES, Fate.NEVER), _WEIGHTS[effect], strict=True):
            if drawn < weight:
                return fate
            drawn -= weight
        return Fate.WELL

    def seconds(self, effect: str) -> float:
        """Return how long it takes: often no time at all, mostly little, sometimes long."""
        if self.calm:
            return 0.0
        drawn = self.chance.random()
        if drawn < 0.5:
            return 0.0
        if drawn < 0.9:
            return self.chance.uniform(0.01, 2.0)
        return self.chance.uniform(0.5, _LATE_S.get(effect, 6.0))

    def error(self, effect: str) -> Exception:
        """Return an error that the effect may end with, a bug of its own among them."""
        kind, message = self.chance.choice(_ERRORS.get(effect, _ANY_ERRORS))
        return kind(message)

    def happens(self, probability: float) -> bool:
        """Return whether something happens that need not."""
        return not self.calm and self.chance.random() < probability
