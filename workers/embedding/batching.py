"""Which waiting texts go through the model together: of like length, within a budget of tokens. Pure.

Above: the engine's thread. A batch costs what its longest text costs, times their number, so texts of like length go
together. The eldest is always among them: nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

# In one batch the shortest text has at least this share of the longest one's tokens, unless there are few: below
# `_FEW_TOKENS` what a text costs is mostly the cost of a call.
_LEAST_SHARE = 0.85
_FEW_TOKENS = 8
WINDOW = 2048
"""How many of the eldest texts are looked at; sorting more would cost more than it gives."""


def choose_batch(lengths: Sequence[int], max_tokens: int, max_texts: int) -> list[int]:
    """Return indices of the texts to run next.

    Args:
        lengths: tokens of each waiting text, in order of arrival; at least one.
        max_tokens: bound on the number of texts times the longest; one text may exceed it.
        max_texts: bound on the number of texts.
    """
    order = sorted(range(min(len(lengths), WINDOW)), key=lambda i: (lengths[i], i))
    at = order.index(0)
    first, last = at, at  # inclusive, in `order`
    while last - first + 1 < max_texts:
        shorter = first > 0 and _fits(lengths[order[first - 1]], lengths[order[last]], last - first + 2, max_tokens)
        longer = last + 1 < len(order) and _fits(
            lengths[order[first]], lengths[order[last + 1]], last - first + 2, max_tokens
        )
        if shorter and longer:
            down = lengths[order[at]] - lengths[order[first - 1]]
            up = lengths[order[last + 1]] - lengths[order[at]]
            shorter = down <= up
        if shorter:
            first -= 1
        elif longer:
            last += 1
        else:
            break
    return order[first : last + 1]


def _fits(shortest: int, longest: int, count: int, max_tokens: int) -> bool:
    return count * longest <= max_tokens and (shortest >= _LEAST_SHARE * longest or longest <= _FEW_TOKENS)
