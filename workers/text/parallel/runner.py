"""Runs a step on every rank of a tensor-parallel model. Above: the engine's loop. Below: `eager.py` on this rank's
part, `followers.py` for the others.

A step's arrays go to the followers first; then all ranks compute the same rows, each with its part of every layer, and
meet in the collectives inside the layers. The logits come out whole on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from workers.text.eager import ModelRunner
from workers.text.packing import PackedStep, pack
from workers.text.parallel.followers import Followers
from workers.text.parallel.wire import encode_step
from workers.text.scheduler import Step


class SplitRunner:
    """The first rank's runner.

    A step that fails on one rank leaves the others inside a collective: no later step can be right. So unlike other
    runners' failures, any failure here is the end of the model, not of one request.

    Args:
        num_blocks: of the cache.
        leave: leaves the group of ranks and frees what it took; called by `close`.
    """

    runs_ahead = False

    def __init__(self, own: ModelRunner, followers: Followers, num_blocks: int, leave: Callable[[], None]) -> None:
        self._own = own
        self._followers = followers
        self._num_blocks = num_blocks
        self._leave = leave
        self._failed = False
        self.name = f"tensor parallel over {len(followers.pids) + 1}"

    @property
    def pids(self) -> list[int]:
        """The followers' process ids."""
        return self._followers.pids

    def run(self, step: Step) -> torch.Tensor:
        """Run one step; see `workers.text.runner.Runner.run`.

        Raises:
            RuntimeError: a rank failed, now or before.
        """
        return self.run_packed(pack(step))

    def run_packed(self, packed: PackedStep) -> torch.Tensor:
        """The same for a packed step."""
        if self._failed:
            raise RuntimeError("a part of this model is lost")
        try:
            self._followers.step(encode_step(packed))
            return self._own.run_packed(packed).cpu()  # waits: what goes wrong on the device does so here
        except Exception as error:
            self._failed = True
            self._followers.lost(f"a step failed: {type(error).__name__}: {error}"[:300])
            raise

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> None:
        """Have a cache of so many blocks on every rank; see `workers.text.runner.Runner.resize`.

        Raises:
            MemoryError, torch.OutOfMemoryError: one had no room; all have what they had.
        """
        self._own.resize(num_blocks, kept)
        try:
            if self._followers.resize(num_blocks, kept):
                self._num_blocks = num_blocks
                return
            self._own.resize(self._num_blocks, kept)
            self._followers.resize(self._num_blocks, kept)
        except Exception as error:
            self._failed = True
            self._followers.lost(f"a resize failed: {type(error).__name__}: {error}"[:300])
            raise
        raise MemoryError("one rank has no room for a larger cache")

    def seconds(self) -> dict[str, float]:
        """Return nothing, as the runner of a model that is not split."""
        return self._own.seconds()

    def close(self) -> None:
        """End the followers, free this rank's part."""
        self._followers.close()
        self._leave()
        self._own.close()
