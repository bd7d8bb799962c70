"""What stands in a prompt besides tokens: rows that replace token embeddings, and positions that are not 0, 1, 2, ….

Above: `vision.py` makes them, `sequence.py` carries them. Below: `runner.py` lays them over a step's packed row
with the functions here. Positions in a prompt are counted in tokens from its start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingSpan:
    """Prompt tokens `start … start + n - 1` take `rows` instead of their token embeddings.

    Attributes:
        rows: (n, hidden) in the model's dtype on its device.
        content_hash: equal only for equal rows. The placeholder ids are the same for every picture, so whatever shares
            cached keys and values between prompts must compare this as well as the ids.
    """

    start: int
    rows: torch.Tensor
    content_hash: bytes

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + self.rows.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class RopePositions:
    """Rotary positions in three dimensions (time, height, width), for models that have them.

    Attributes:
        prompt: (3, num_prompt_tokens) int64.
        offset: token `i` after the prompt is at `i + offset` in all three.
    """

    prompt: torch.Tensor
    offset: int

    def between(self, start: int, end: int) -> torch.Tensor:
        """Return the positions of tokens `start … end - 1`: (3, end - start) int64."""
        num_prompt = self.prompt.shape[1]
        after = torch.arange(max(start, num_prompt), max(end, num_prompt), device=self.prompt.device) + self.offset
        return torch.cat((self.prompt[:, start:end], after.expand(3, -1)), dim=1)


@dataclass(frozen=True, slots=True)
class PromptExtras:
    """Everything of a prompt that its token ids do not say."""

    embeddings: tuple[EmbeddingSpan, ...] = ()
    rope: RopePositions | None = None


def overlaps(spans: Iterable[EmbeddingSpan], start: int, end: int) -> bool:
    """Tell whether any span covers one of the tokens `start … end - 1`."""
    return any(span.start < end and start < span.end for span in spans)


def overlay(hidden: torch.Tensor, row: int, start: int, end: int, spans: Iterable[EmbeddingSpan]) -> None:
    """Write the spans' rows over token embeddings, in place.

    Args:
        hidden: (rows, hidden): embeddings of a step.
        row: where token `start` of this sequence stands in it; its tokens up to `end` follow.
        spans: the sequence's.
    """
    for span in spans:
        first, last = max(start, span.start), min(end, span.end)
        if first < last:
            hidden[row + first - start : row + last - start] = span.rows[first - span.start : last - span.start]
