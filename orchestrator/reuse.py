"""How often a model is used: a rate learned from arrivals. Pure; the caller brings the clock.

Above it: the scheduler's state and the simulator. Below it: nothing.

The past fades on several time scales at once, and the rate is their mean: seconds tell that a conversation goes on,
hours that a model is popular, days that it will be asked for again. Together they fade about as one over the time that
has passed, which is how need for what was once used fades (Anderson and Schooler 1991). No single half-life did as well
over the simulator's traces, and neither the number of scales nor their weights mattered much.

How much each scale counts is learned for each model, as the kernel of a self-exciting process is (Hawkes 1971, by
expectation maximization): a scale foretells one use for each use, soon or late, and is credited with its share of every
use that comes. A model that a crawler asks for every few hours so loses the scales that expect it back within seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SHORTEST_S = 15.0
NUM_SCALES = 7
LONGEST_S = SHORTEST_S * 4 ** (NUM_SCALES - 1)
"""Half-lives rise by four: 15 s, 1 min, 4 min, 16 min, about 1, 4 and 17 h."""
AHEAD_S = 300.0
"""How far `lasting_per_s` looks."""
PRIOR_USES = 1.0
"""How many uses it takes until what was learned of a scale counts as much as that all are alike."""
_RATES: tuple[float, ...] = tuple(math.log(2) * 4**i / LONGEST_S for i in range(NUM_SCALES))
_RATES_AHEAD: tuple[float, ...] = tuple((1.0 - math.exp(-rate * AHEAD_S)) / AHEAD_S for rate in _RATES)
_NOTHING = (0.0,) * NUM_SCALES


@dataclass(slots=True)
class Reuse:
    """Uses a second. Tuples have a value for each scale, longest first; all are empty or zero before the first use.

    Attributes:
        weights: past uses as they have faded.
        shares: how much each counts; their sum is 1.
        foretold: uses that it foretold and that should have come by now.
        credited: its share of those that came.
    """

    weights: tuple[float, ...] = ()
    at_s: float = 0.0
    shares: tuple[float, ...] = (1.0 / NUM_SCALES,) * NUM_SCALES
    foretold: tuple[float, ...] = _NOTHING
    credited: tuple[float, ...] = _NOTHING

    def seen(self, now_s: float) -> None:
        """Count one use."""
        faded = self._faded(now_s) or _NOTHING
        if self.weights:
            self._learn(faded)
        self.weights, self.at_s = tuple(weight + 1.0 for weight in faded), now_s

    def per_s(self, now_s: float) -> float:
        """Return the expected rate now."""
        return self._mean(now_s, _RATES)

    def lasting_per_s(self, now_s: float) -> float:
        """Return the expected rate over the next `AHEAD_S`: what keeping the model for a while is worth."""
        return self._mean(now_s, _RATES_AHEAD)

    def _mean(self, now_s: float, rates: tuple[float, ...]) -> float:
        return sum(s * w * rate for s, w, rate in zip(self.shares, self._faded(now_s), rates, strict=False))

    def _learn(self, faded: tuple[float, ...]) -> None:
        """Hold each scale to what it foretold since the last use, now that the next one has come."""
        told = [s * w * rate for s, w, rate in zip(self.shares, faded, _RATES, strict=True)]
        total = sum(told)
        due = [before - now for before, now in zip(self.weights, faded, strict=True)]
        self.foretold = tuple(f + one for f, one in zip(self.foretold, due, strict=True))
        if total > 0.0:
            self.credited = tuple(c + one / total for c, one in zip(self.credited, told, strict=True))
        right = [
            (PRIOR_USES + NUM_SCALES * c) / (PRIOR_USES + f) for c, f in zip(self.credited, self.foretold, strict=True)
        ]
        self.shares = tuple(one / sum(right) for one in right)

    def _faded(self, now_s: float) -> tuple[float, ...]:
        share: float = 0.5 ** (max(0.0, now_s - self.at_s) / LONGEST_S)
        faded = []
        for weight in self.weights:
            faded.append(weight * share)
            share *= share  # To the fourth power: the next half-life is a quarter of this one.
            share *= share
        return tuple(faded)
