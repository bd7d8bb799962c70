"""Runs a step through transformers' own model definition; the seam that every runner fills.

Above: the engine's loop. Below: the model, which calls `attention.attend` for each layer with our context.
`native/runner.py` is the other runner: the same steps in C++ on the CPU.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from workers.text.attention import PagedCache, StepContext
from workers.text.embeddings import overlaps, overlay
from workers.text.packing import PackedStep, pack
from workers.text.scheduler import Step, Work
from workers.text.threads import Threads

Placed = tuple[tuple[int, Work], ...]


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


class ModelRunner:
    """Transformers' definition with our attention over a paged cache, on any device."""

    name = "eager"

    def __init__(self, model: Any, cache: PagedCache, threads: Threads) -> None:
        self._model = model
        self._cache = cache
        self._threads = threads

    def run(self, step: Step) -> torch.Tensor:
        """Run one step; see `Runner.run`."""
        return self.run_packed(pack(step))

    @torch.inference_mode()
    def run_packed(self, packed: PackedStep) -> torch.Tensor:
        """The same for a packed step."""
        torch.set_num_threads(self._threads.for_rows(packed.tokens.size))
        device = self._cache.device

        def here(array: Any) -> torch.Tensor:
            return torch.from_numpy(array).to(device, torch.long)

        output = self._model(
            **self._inputs(here(packed.tokens)[None], packed.placed),
            position_ids=_positions(here(packed.positions)[None], packed.placed),
            use_cache=False,
            logits_to_keep=here(packed.logit_rows),
            step=StepContext.of(packed, self._cache),
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float().cpu()

    def _inputs(self, ids: torch.Tensor, placed: Placed) -> dict[str, torch.Tensor]:
        """Return the ids (1, rows) or, where pictures stand among them, embeddings (1, rows, hidden)."""
        seeing = [(row, w) for row, w in placed if overlaps(w.sequence.embeddings, w.start, w.end)]
        if not seeing:
            return {"input_ids": ids}
        hidden = self._model.get_input_embeddings()(ids)
        for row, work in seeing:
            overlay(hidden[0], row, work.start, work.end, work.sequence.embeddings)
        return {"inputs_embeds": hidden}

    def seconds(self) -> dict[str, float]:
        """Return nothing: torch's operators are not taken apart."""
        return {}

    def close(self) -> None:
        """Let go of the model and the cache."""
        del self._model, self._cache


def _positions(plain: torch.Tensor, placed: Placed) -> torch.Tensor:
    """Return positions (1, rows) or, where a sequence has three-dimensional ones, (3, 1, rows)."""
    if all(work.sequence.rope is None for _, work in placed):
        return plain
    positions = plain.repeat(3, 1)
    for row, work in placed:
        if work.sequence.rope is not None:
            end = work.start + work.num_rows
            positions[:, row : row + work.num_rows] = work.sequence.rope.between(work.start, end)
    return positions[:, None]
