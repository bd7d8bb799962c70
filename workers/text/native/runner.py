"""Runs a step in the compiled kernels, after proving them against transformers' own definition.

Above: the engine's loop and `opening.py`. Below: `decoder.py`. A model is taken only when its family is known and its
logits agree with the module's on a probe of random tokens, prefilled in two chunks and decoded; so a new transformers
version or a processor that miscompiles costs speed, never answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from workers.text.kv_cache import blocks_for
from workers.text.native.decoder import NativeDecoder
from workers.text.packing import PackedStep, pack
from workers.text.scheduler import Step

PROBE_TOKENS = 21
# Least cosine between the logits of every probed position. bfloat16 rounds differently in the two; quantized weights
# are compared with unquantized ones.
_LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.995, "int8": 0.97, "int4": 0.5}


class NativeRunner:
    """The kernels as the engine's runner."""

    name = "native"
    runs_ahead = False

    def __init__(self, decoder: NativeDecoder, num_threads: int) -> None:
        self._decoder = decoder
        self._num_threads = num_threads

    @property
    def decoder(self) -> NativeDecoder:
        """The packed model, for statistics."""
        return self._decoder

    def run(self, step: Step) -> torch.Tensor:
        """Run one step; see `workers.text.runner.Runner.run`."""
        return self.run_packed(pack(step))

    def run_packed(self, packed: PackedStep) -> torch.Tensor:
        """The same for a packed step."""
        # What torch does between two steps, sampling, stays in this thread: others that it woke would spin on for
        # milliseconds, on the cores that the kernels are about to use (4 rows: 16 ms a step instead of 11).
        torch.set_num_threads(1)
        logits = self._decoder.step(
            tokens=packed.tokens,
            positions=packed.positions,
            sequences=packed.sequences,
            tables=packed.tables,
            logit_rows=packed.logit_rows,
            num_threads=self._num_threads,
            adapters=packed.adapters,
            **_pictures(packed),
        )
        return torch.from_numpy(logits)

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> None:
        """Have a cache of so many blocks; see `workers.text.runner.Runner.resize`."""
        self._decoder.resize(num_blocks, {old: new for old, new in kept.items() if old != new})

    def seconds(self) -> dict[str, float]:
        """Return the seconds spent in linear layers, attention, the head and the rest since the last call."""
        return self._decoder.seconds()

    def close(self) -> None:
        """Free weights and cache."""
        self._decoder.close()


def _pictures(packed: PackedStep) -> dict[str, Any]:
    """The rows of a step that are no token: which, and their embeddings (n, hidden) float32."""
    rows: list[int] = []
    values: list[torch.Tensor] = []
    for first_row, work in packed.placed:
        for span in work.sequence.embeddings:
            first, last = max(work.start, span.start), min(work.end, span.end)
            if first < last:
                rows.extend(range(first_row + first - work.start, first_row + last - work.start))
                values.append(span.rows[first - span.start : last - span.start].float())
    if not rows:
        return {}
    return {"override_rows": np.asarray(rows, np.int32), "overrides": torch.cat(values).contiguous().numpy()}


def probe(vocab_size: int) -> list[PackedStep]:
    """Return steps that run a few random tokens through the first cache blocks: two chunks, then one token."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, PROBE_TOKENS).astype(np.int32)
    table = np.arange(blocks_for(PROBE_TOKENS), dtype=np.int32)[None]
    steps = []
    for start, end in ((0, 7), (7, PROBE_TOKENS - 1), (PROBE_TOKENS - 1, PROBE_TOKENS)):
        rows = end - start
        steps.append(
            PackedStep(
                tokens=tokens[start:end].copy(),
                positions=np.arange(start, end, dtype=np.int32),
                sequences=np.asarray([[0, rows, start, 0]], np.int32),
                tables=table,
                logit_rows=np.arange(rows, dtype=np.int32),
                num_singles=int(rows == 1),
            )
        )
    return steps


def agree(got: torch.Tensor, expected: torch.Tensor, weights: str, *, routed: bool = False) -> bool:
    """Return whether two runners' logits (rows, vocab) for the same rows are alike enough.

    Args:
        weights: how the less exact of the two keeps them.
        routed: whether layers choose among experts. Rounding then sends some rows to others than it sends them without:
            a quarter of the rows may differ, where nothing wrong would leave three quarters alone.
    """
    cosines = torch.nn.functional.cosine_similarity(got.double(), expected.double(), dim=1).sort().values
    least = cosines[len(cosines) // 4 if routed and weights != "float32" else 0]
    return bool(torch.isfinite(got).all()) and float(least) >= _LEAST_COSINE[weights]
