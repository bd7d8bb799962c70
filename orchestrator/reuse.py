"""How often a model is used: a rate learned from arrivals. Pure; the caller brings the clock.

Above it: the scheduler's state and the simulator. Below it: nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HALF_LIFE_S = 600.0


@dataclass(slots=True)
class Reuse:
    """Uses a second, with the past fading by half every `HALF_LIFE_S`."""

    weight: float = 0.0
    at_s: float = 0.0

    def seen(self, now_s: float) -> None:
        """Count one use."""
        self.weight = self._faded(now_s) + 1.0
        self.at_s = now_s

    def per_s(self, now_s: float) -> float:
        """Return the expected rate now."""
        return self._faded(now_s) * math.log(2) / HALF_LIFE_S

    def _faded(self, now_s: float) -> float:
        return self.weight * 0.5 ** ((now_s - self.at_s) / HALF_LIFE_S) if self.weight else 0.0
