"""How many prompt tokens a step may take: learned from how long steps last, so that nobody's stream stalls.

Pure arithmetic over observed steps; the scheduler asks, the engine tells. A step with prompt tokens delays every
running stream; a step without them delays everyone who waits for a first token. So whoever are more go first: a lone
newcomer may stretch the steps of many streams only a little, the more newcomers the more, and a crowd of them makes a
few streams wait. Streams that began while others waited have had their turn, and count as newcomers until all are in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# What prompt tokens may add to a step, in steps without them: for one newcomer among many streams, and for as many
# newcomers as there are streams. The first keeps a stream's longest gap within three steps although a machine that has
# other things to do makes a single step half as long again.
ALONE, EQUAL = 0.35, 1.5
# No step lasts longer than this because of prompt tokens, whoever waits: streams, cancellations and newcomers see it.
LONGEST_S = 0.15
# Not more than this at the least: int8 weights halve a decode step but not a prompt token, and on a few cores sixteen
# prompt tokens alone stretched such a step threefold.
MIN_CHUNK, MAX_CHUNK = 4, 768
FIRST_CHUNK = 64
_WEIGHT = 0.2
# How far chunks must have differed, in parts of their mean, before what they tell of a step's fixed share is believed;
# and the least that is believed of a token: chance alone may say that more of them cost nothing.
_SPREAD, _LEAST_SHARE = 0.25, 0.5
# By what factor one step may differ from what is known: the system takes a core away for longer than a chunk lasts.
_SURPRISE = 2.0


@dataclass(slots=True)
class ChunkCost:
    """What prompt tokens add to a step: a fixed share, because there are any, and so much for each. In seconds.

    A weighted line through the steps seen, the latest most. With one figure for each token alone small chunks look
    dear, so smaller ones are taken, which look dearer.
    """

    tokens: float = 0.0
    added_s: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0

    def observe(self, num_tokens: int, added_s: float) -> None:
        """Learn from one step with prompt tokens."""
        if not self.tokens:
            self.tokens, self.added_s = num_tokens, added_s
            return
        likely_s = self.added_s + self.token_s * (num_tokens - self.tokens)
        added_s = min(max(added_s, likely_s / _SURPRISE), likely_s * _SURPRISE)
        off, off_s = num_tokens - self.tokens, added_s - self.added_s
        self.tokens += _WEIGHT * off
        self.added_s += _WEIGHT * off_s
        self._variance = (1 - _WEIGHT) * (self._variance + _WEIGHT * off * off)
        self._covariance = (1 - _WEIGHT) * (self._covariance + _WEIGHT * off * off_s)

    @property
    def token_s(self) -> float:
        """Each token's time: all of what they add, less what seems to be fixed."""
        mean_s = self.added_s / self.tokens
        doubt = (_SPREAD * self.tokens) ** 2
        seen_s = (self._covariance + doubt * mean_s) / (self._variance + doubt)
        return min(mean_s, max(_LEAST_SHARE * mean_s, seen_s))

    def tokens_within(self, allowed_s: float) -> float:
        """Return how many tokens add so much."""
        each_s = self.token_s
        fixed_s = self.added_s - self.tokens * each_s
        return (allowed_s - fixed_s) / each_s if each_s else float("inf")


@dataclass(slots=True)
class Pace:
    """Estimates of one engine, in seconds.

    Attributes:
        max_chunk: most prompt tokens of one step.
        base_s: a step's time by number of decoding sequences, steps without prompt tokens.
        cost: what prompt tokens add.
    """

    max_chunk: int = MAX_CHUNK
    base_s: dict[int, float] = field(default_factory=dict)
    cost: ChunkCost = field(default_factory=ChunkCost)

    def observe(self, num_decoding: int, num_prompt_tokens: int, spent_s: float) -> None:
        """Learn from one step."""
        if num_prompt_tokens == 0:
            known = self.base_s.get(num_decoding)
            self.base_s[num_decoding] = spent_s if known is None else known + _WEIGHT * (spent_s - known)
        elif num_prompt_tokens >= MIN_CHUNK:
            self.cost.observe(num_prompt_tokens, max(0.0, spent_s - self.expected_s(num_decoding)))

    def expected_s(self, num_decoding: int) -> float:
        """Return how long a step of so many decoding sequences takes: as seen, else on the line through its neighbours.

        Of more than were ever seen, on the line through the fewest and the most. Of none, as long as of the fewest: it
        reads all weights, too, and what its prompt tokens add is the rest.
        """
        if not self.base_s:
            return 0.0
        if num_decoding in self.base_s:
            return self.base_s[num_decoding]
        below = max((n for n in self.base_s if n < num_decoding), default=None)
        above = min((n for n in self.base_s if n > num_decoding), default=None)
        if below is None:
            return self.base_s[above]  # type: ignore[index]
        if above is None:
            below, above = min(self.base_s), below
            if below == above:
                return self.base_s[above]
        share = (num_decoding - below) / (above - below)
        return self.base_s[below] + share * max(0.0, self.base_s[above] - self.base_s[below])

    def chunk_tokens(self, num_decoding: int, num_waiting: int, num_older: int) -> int:
        """Return the most prompt tokens of the next step.

        Args:
            num_decoding: sequences that get a token in it.
            num_waiting: sequences that wait for their first token.
            num_older: how many of those decoding did so before any of those waiting could have begun.
        """
        if self.cost.added_s == 0.0:
            return min(self.max_chunk, FIRST_CHUNK)
        allowed_s = LONGEST_S
        num_newer = num_waiting + num_decoding - num_older
        if num_older >= num_newer:
            stretch = ALONE + (EQUAL - ALONE) * (num_newer - 1) / max(1, num_older - 1)
            allowed_s = min(LONGEST_S, stretch * self.expected_s(num_decoding))
        return int(max(MIN_CHUNK, min(self.max_chunk, self.cost.tokens_within(allowed_s))))
