"""Runs one step through the model: packed tokens in, one row of logits for each finished row out.

The only place where the model definition is called. Used by the engine's thread.
"""

from __future__ import annotations

from typing import Any

import torch

from workers.text.attention import Chunk, StepContext
from workers.text.embeddings import overlaps, overlay
from workers.text.kv_cache import SlotCache
from workers.text.scheduler import Step, Work


class ModelRunner:
    """A model, its cache, and how a `Step` becomes tensors."""

    def __init__(self, model: Any, cache: SlotCache) -> None:
        self._model = model
        self._cache = cache

    @property
    def cache(self) -> SlotCache:
        """The cache that steps write to."""
        return self._cache

    def move(self, step: Step) -> None:
        """Carry out the step's slot moves, in order."""
        for move in step.moves:
            self._cache.move(move.source, move.target, move.num_tokens)

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor:
        """Run one step.

        Returns:
            (rows, vocab) float32 on the CPU: first the decodes, then those prefills whose last token it was.
        """
        self.move(step)
        decodes = sorted(step.decodes, key=lambda w: w.sequence.slot)
        ids = [w.sequence.token_ids[w.start] for w in decodes]
        positions = [w.start for w in decodes]
        rows = list(range(len(decodes)))
        packed = list(zip(rows, decodes, strict=True))
        chunks: list[Chunk] = []
        for work in step.prefills:
            packed.append((len(ids), work))
            chunks.append(Chunk(len(ids), work.end - work.start, work.sequence.slot, work.start))
            ids.extend(work.sequence.token_ids[work.start : work.end])
            positions.extend(range(work.start, work.end))
            if work.yields_token:
                rows.append(len(ids) - 1)
        device = self._cache.device
        slots = [w.sequence.slot for w in decodes]
        span_positions = [0] * (max(slots) + 1 if slots else 0)
        for slot, work in zip(slots, decodes, strict=True):
            span_positions[slot] = work.start
        context = StepContext(
            cache=self._cache,
            num_decodes=len(decodes),
            decode_slots=torch.tensor(slots, dtype=torch.long, device=device),
            decode_positions=torch.tensor(positions[: len(decodes)], dtype=torch.long, device=device),
            span_positions=torch.tensor(span_positions, dtype=torch.long, device=device),
            length=max(span_positions, default=-1) + 1,
            chunks=tuple(chunks),
            masks={},
        )
        output = self._model(
            **self._inputs(torch.tensor([ids], dtype=torch.long, device=device), packed),
            position_ids=_positions(torch.tensor([positions], dtype=torch.long, device=device), packed),
            use_cache=False,
            logits_to_keep=torch.tensor(rows, dtype=torch.long, device=device),
            step=context,
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float().cpu()

    def _inputs(self, ids: torch.Tensor, packed: list[tuple[int, Work]]) -> dict[str, torch.Tensor]:
        """Return the ids (1, rows) or, where pictures stand among them, embeddings (1, rows, hidden).

        Args:
            packed: each sequence's first row and its work.
        """
        seeing = [(row, w) for row, w in packed if overlaps(w.sequence.embeddings, w.start, w.end)]
        if not seeing:
            return {"input_ids": ids}
        hidden = self._model.get_input_embeddings()(ids)
        for row, work in seeing:
            overlay(hidden[0], row, work.start, work.end, work.sequence.embeddings)
        return {"inputs_embeds": hidden}


def _positions(plain: torch.Tensor, packed: list[tuple[int, Work]]) -> torch.Tensor:
    """Return positions (1, rows) or, where a sequence has three-dimensional ones, (3, 1, rows)."""
    if all(work.sequence.rope is None for _, work in packed):
        return plain
    positions = plain.repeat(3, 1)
    for row, work in packed:
        if work.sequence.rope is not None:
            positions[:, row : row + work.end - work.start] = work.sequence.rope.between(work.start, work.end)
    return positions[:, None]
