"""How many prompt tokens a step may take: learned from how long steps last, so that nobody's stream stalls.

Pure arithmetic over observed steps; the scheduler asks, the engine tells. A step with prompt tokens delays every
running stream; a step without them delays everyone who waits for a first token. So whoever are more go first: a lone
newcomer may stretch the steps of many streams only a little, a crowd of newcomers makes a few streams wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# A step with prompt tokens may last this many times a step without them.
STRETCH = 1.9
# No step lasts longer than this because of prompt tokens, whoever waits: streams, cancellations and newcomers see it.
LONGEST_S = 0.15
# Not more than this at the least: int8 weights halve a decode step but not a prompt token, and on a few cores sixteen
# prompt tokens alone stretched such a step threefold.
MIN_CHUNK, MAX_CHUNK = 4, 512
FIRST_CHUNK = 64
_WEIGHT = 0.2


@dataclass(slots=True)
class Pace:
    """Estimates of one engine, in seconds.

    Attributes:
        max_chunk: most prompt tokens of one step.
        base_s: a step's time by number of decoding sequences, steps without prompt tokens.
        token_s: additional time of one prompt token.
    """

    max_chunk: int = MAX_CHUNK
    base_s: dict[int, float] = field(default_factory=dict)
    token_s: float = 0.0

    def observe(self, num_decoding: int, num_prompt_tokens: int, spent_s: float) -> None:
        """Learn from one step."""
        if num_prompt_tokens == 0:
            known = self.base_s.get(num_decoding)
            self.base_s[num_decoding] = spent_s if known is None else known + _WEIGHT * (spent_s - known)
            return
        if num_prompt_tokens < MIN_CHUNK:
            return
        each_s = max(0.0, spent_s - self.expected_s(num_decoding)) / num_prompt_tokens
        self.token_s = each_s if self.token_s == 0.0 else self.token_s + _WEIGHT * (each_s - self.token_s)

    def expected_s(self, num_decoding: int) -> float:
        """Return how long a step of so many decoding sequences takes: as seen, else between its neighbours."""
        if num_decoding == 0 or not self.base_s:
            return 0.0
        if num_decoding in self.base_s:
            return self.base_s[num_decoding]
        below = max((n for n in self.base_s if n < num_decoding), default=None)
        above = min((n for n in self.base_s if n > num_decoding), default=None)
        if below is None or above is None:
            return self.base_s[below if above is None else above]  # type: ignore[index]
        share = (num_decoding - below) / (above - below)
        return self.base_s[below] + share * (self.base_s[above] - self.base_s[below])

    def chunk_tokens(self, num_decoding: int, num_waiting: int) -> int:
        """Return the most prompt tokens of the next step.

        Args:
            num_decoding: sequences that would wait for them.
            num_waiting: sequences that wait for their first token.
        """
        if self.token_s == 0.0:
            return min(self.max_chunk, FIRST_CHUNK)
        allowed_s = LONGEST_S
        if num_decoding >= num_waiting:
            allowed_s = min(LONGEST_S, (STRETCH - 1.0) * self.expected_s(num_decoding))
        return max(MIN_CHUNK, min(self.max_chunk, int(allowed_s / self.token_s)))
