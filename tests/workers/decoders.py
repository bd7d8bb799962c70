"""Kernels over tiny models, one step at a time, and what transformers' definition says of the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workers.engine import LoadSpec
from workers.text.attention import PagedCache
from workers.text.describe import describe
from workers.text.directory import LoadedModel
from workers.text.eager import ModelRunner
from workers.text.kv_cache import KVShape, blocks_for
from workers.text.loader import load
from workers.text.native import build
from workers.text.native.decoder import NativeDecoder
from workers.text.native.runner import PROBE_TOKENS, NativeRunner, probe
from workers.text.threads import Threads

VOCABULARY = 1024


def opened(path: Path, **fields: Any) -> tuple[LoadedModel, LoadSpec]:
    """Return a model of float32 weights and how it was loaded."""
    spec = LoadSpec(model="tiny", path=str(path), **{"dtype": "float32", "num_threads": 1, **fields})
    return load(spec, lambda *_: None), spec


def decoder_of(
    loaded: LoadedModel, weights: str, *, cache: str = "float32", num_threads: int = 2, library: Path | None = None
) -> NativeRunner:
    """Return the kernels' runner with weights and cache of these kinds, the library for this processor by default."""
    description = describe(loaded.decoder, loaded.head, loaded.text_config)
    decoder = NativeDecoder(
        library or build.build(), description, weights=weights, cache=cache, num_blocks=64, num_threads=num_threads
    )
    return NativeRunner(decoder, num_threads)


def reference_logits(loaded: LoadedModel) -> torch.Tensor:
    """Return what transformers' definition computes for the probe: (rows, vocabulary)."""
    shape = KVShape(
        loaded.kv.num_layers, loaded.kv.num_kv_heads, loaded.kv.head_dim, blocks_for(PROBE_TOKENS), PROBE_TOKENS
    )
    runner = ModelRunner(loaded.model, PagedCache(shape, torch.float32, torch.device("cpu")), Threads(1, 1))
    return torch.cat([runner.run_packed(step) for step in probe(VOCABULARY)])


def logits(runner: NativeRunner) -> torch.Tensor:
    """Return what the kernels compute for it."""
    return torch.cat([runner.run_packed(step) for step in probe(VOCABULARY)])


def last_row(runner: NativeRunner, num_sequences: int, num_threads: int) -> np.ndarray[Any, Any]:
    """Return the last logits of the last of so many equal prompts of seven tokens, in one step: (1, vocabulary)."""
    first, *_ = probe(VOCABULARY)
    return runner.decoder.step(
        tokens=np.tile(first.tokens, num_sequences),
        positions=np.tile(first.positions, num_sequences),
        sequences=np.asarray([[7 * i, 7, 0, i] for i in range(num_sequences)], np.int32),
        tables=np.arange(num_sequences, dtype=np.int32)[:, None],
        logit_rows=np.asarray([7 * num_sequences - 1], np.int32),
        num_threads=num_threads,
    )


def in_companies(
    loaded: LoadedModel, weights: str, companies: Sequence[tuple[int, int]], library: Path | None = None
) -> list[np.ndarray[Any, Any]]:
    """Return `last_row` of new kernels for each (threads, sequences)."""
    return [
        last_row(
            decoder_of(loaded, weights, cache="bfloat16", num_threads=num_threads, library=library),
            num_sequences,
            num_threads,
        )
        for num_threads, num_sequences in companies
    ]
