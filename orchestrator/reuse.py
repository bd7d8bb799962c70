"""How often a model is used: a rate learned from arrivals. Pure; the caller brings the clock.

Above it: the scheduler's state and the simulator. Below it: nothing.

The past fades on several time scales at once, and the rate is their mean: seconds tell that a conversation goes on,
hours that a model is popular, days that it will be asked for again. Together they fade about as one over the time that
has passed, which is how need for what was once used fades (Anderson and Schooler 1991). No single half-life did as well
over the simulator's traces, and neither the number of scales nor their weights mattered much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SHORTEST_S = 15.0
NUM_SCALES = 7
LONGEST_S = SHORTEST_S * 4 ** (NUM_SCALES - 1)
"""Half-lives rise by four: 15 s, 1 min, 4 min, 16 min, about 1, 4 and 17 h."""
_RATES: tuple[float, ...] = tuple(math.log(2) * 4**i / LONGEST_S / NUM_SCALES for i in range(NUM_SCALES))


@dataclass(slots=True)
class Reuse:
    """Uses a second. `weights`: past uses as they have faded on each scale, longest first; empty before the first."""

    weights: tuple[float, ...] = ()
    at_s: float = 0.0

    def seen(self, now_s: float) -> None:
        """Count one use."""
        self.weights = tuple(weight + 1.0 for weight in self._faded(now_s) or (0.0,) * NUM_SCALES)
        self.at_s = now_s

    def per_s(self, now_s: float) -> float:
        """Return the expected rate now."""
        return sum(weight * rate for weight, rate in zip(self._faded(now_s), _RATES, strict=False))

    def _faded(self, now_s: float) -> list[float]:
        share: float = 0.5 ** (max(0.0, now_s - self.at_s) / LONGEST_S)
        faded = []
        for weight in self.weights:
            faded.append(weight * share)
            share *= share  # To the fourth power: the next half-life is a quarter of this one.
            share *= share
        return faded
