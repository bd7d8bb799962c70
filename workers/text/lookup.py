"""Guesses a sequence's next tokens from its own past: what followed the last three tokens when they came before.

Prompt look-up decoding (Saxena 2023): a step checks several guessed tokens for little more than the price of one where
reading the weights is the cost. Every guess is checked against what the model itself samples, so replies are the same
with and without it. Above: `Sequence`. Pure.
"""

from __future__ import annotations

_GRAM = 3
_MOST = 4
# Share of guesses that proved right, below which guessing costs more than it gives; a sequence starts just above it.
_WORTH = 0.35
_FIRST = 0.4
_WEIGHT = 0.15
# After giving up, so many tokens pass before the next try.
_PAUSE_TOKENS = 24


class Lookup:
    """The past of one sequence.

    Args:
        token_ids: the sequence's own list, which grows as it generates.
    """

    __slots__ = ("_after", "_ids", "_indexed", "_resume_at", "_score")

    def __init__(self, token_ids: list[int]) -> None:
        self._ids = token_ids
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = _GRAM
        self._score = _FIRST
        self._resume_at = 0

    def learn(self, num_drafted: int, num_right: int) -> None:
        """Note how a draft fared."""
        if num_drafted:
            self._score += _WEIGHT * (num_right / num_drafted - self._score)
            if self._score < _WORTH:
                self._resume_at, self._score = len(self._ids) + _PAUSE_TOKENS, _FIRST

    def guess(self) -> tuple[int, ...]:
        """Return the tokens that may come next, or none."""
        ids = self._ids
        if len(ids) < max(_GRAM, self._resume_at):
            return ()
        for end in range(self._indexed, len(ids)):
            self._after[tuple(ids[end - _GRAM : end])] = end
        self._indexed = max(self._indexed, len(ids))
        at = self._after.get(tuple(ids[-_GRAM:]))
        return () if at is None else tuple(ids[at : at + _MOST])
