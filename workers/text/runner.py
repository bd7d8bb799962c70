"""The seam that every runner fills: a step in, logits out.

Above: the engine's loop. Below: `eager.py` (transformers' own definition) and `native/runner.py` (compiled kernels).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch

from workers.text.kv_cache import KVShape
from workers.text.scheduler import Step


class Runner(Protocol):
    """A model, its keys and values, and how a `Step` becomes logits. Used by the engine's thread only."""

    @property
    def name(self) -> str:
        """What logs and statistics call it."""

    @property
    def runs_ahead(self) -> bool:
        """Whether `run` returns before the device is done, which whoever reads the logits waits for."""

    def run(self, step: Step) -> torch.Tensor:
        """Run one step: keys and values of all its tokens are in the cache afterwards.

        Returns:
            (rows, vocab) float32, where the head is: for each work in order, the rows that may yield a token.
        """

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> None:
        """Have a cache of so many blocks. Between two steps only.

        Args:
            num_blocks: more or fewer than now.
            kept: old and new index of every block whose contents must stay; no new one is the old one of another. Of
                what is beyond the new end, memory goes back to the system.

        Raises:
            MemoryError, torch.OutOfMemoryError: no room to grow; nothing has changed.
        """

    def seconds(self) -> dict[str, float]:
        """Return the seconds spent in each part of the model since the last call; empty when it cannot tell."""

    def close(self) -> None:
        """Free what it holds."""


@runtime_checkable
class Movable(Runner, Protocol):
    """A runner whose weights can wait in host memory. Used by one thread at a time."""

    def move_to_host(self, facts: object) -> str:
        """Bring the weights to pinned host memory; drop keys and values.

        Args:
            facts: what another process should know that takes the weights over.

        Returns:
            the path that it takes them from, while they wait (`workers.text.shelf`); empty where that cannot be.
        """

    def move_to_device(self, kv: KVShape, device: torch.device) -> None:
        """Bring them back, to this device or another one, with an empty cache of a new size."""
