"""The seam that every runner fills: a step in, logits out.

Above: the engine's loop. Below: `eager.py` (transformers' own definition) and `native/runner.py` (compiled kernels).
"""

from __future__ import annotations

from typing import Protocol

import torch

from workers.text.scheduler import Step


class Runner(Protocol):
    """A model, its keys and values, and how a `Step` becomes logits. Used by the engine's thread only."""

    @property
    def name(self) -> str:
        """What logs and statistics call it."""

    def run(self, step: Step) -> torch.Tensor:
        """Run one step: keys and values of all its tokens are in the cache afterwards.

        Returns:
            (rows, vocab) float32 on the CPU: for each work in order, the rows that may yield a token.
        """

    def seconds(self) -> dict[str, float]:
        """Return the seconds spent in each part of the model since the last call; empty when it cannot tell."""

    def close(self) -> None:
        """Free what it holds."""
