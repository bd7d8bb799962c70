"""How many CPU threads a worker's steps should use: measured on its own weights, not guessed.

Two virtual cores are often two halves of one real core, or shared with other machines; then a second thread adds
barriers and no speed, and takes the core that the gateway and the clients need. So: double the threads only while
that makes the products clearly faster; and decide apart for decode steps (few rows, many barriers) and for prefill
(many rows, few barriers).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

# A doubling of threads must bring at least this, or it costs more elsewhere than it gives.
MIN_GAIN = 1.35
DECODE_ROWS, PREFILL_ROWS = 16, 64
_REPEATS = 7


def choose(time_with: Callable[[int], float], limit: int) -> int:
    """Return the number of threads, 1 … `limit`, given a function that times the work with so many."""
    best, best_s = 1, time_with(1)
    while best * 2 <= limit:
        doubled_s = time_with(best * 2)
        if doubled_s * MIN_GAIN > best_s:
            break
        best, best_s = best * 2, doubled_s
    return best


@dataclass(frozen=True, slots=True)
class Threads:
    """Threads for steps with fewer than `PREFILL_ROWS` rows, and for the others."""

    decode: int
    prefill: int

    def for_rows(self, num_rows: int) -> int:
        """Return how many threads a step with so many rows should use."""
        return self.prefill if num_rows >= PREFILL_ROWS else self.decode


def measure(model: Any, device: torch.device) -> Threads:
    """Return the thread counts for a loaded model; about 0.1 s of a CPU."""
    if device.type != "cpu":
        return Threads(1, 1)
    layer = max((m for m in model.modules() if hasattr(m, "in_features")), key=_size_below_head(model))
    dtype = next(model.parameters()).dtype

    @torch.inference_mode()
    def seconds(rows: int, num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        hidden = torch.zeros((1, rows, layer.in_features), dtype=dtype)
        samples = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            for _ in range(4):
                layer(hidden)
            samples.append(time.perf_counter() - began)
        return median(samples[1:])

    cores = len(os.sched_getaffinity(0))
    # A decode step has hundreds of barriers, and whoever takes one of its cores for a moment holds all of them up: one
    # core stays free for the gateway and the clients.
    return Threads(
        choose(partial(seconds, DECODE_ROWS), max(1, cores - 1)), choose(partial(seconds, PREFILL_ROWS), cores)
    )


def _size_below_head(model: Any) -> Callable[[Any], int]:
    """Rank linear layers by size, the vocabulary's head last: it runs once a step, the others once a layer."""
    head = model.get_output_embeddings()
    return lambda module: 0 if module is head else module.in_features * module.out_features
