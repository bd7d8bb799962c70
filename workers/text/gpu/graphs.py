"""Decode steps as CUDA graphs: what a step launches is recorded once for each batch size, and then replayed.

Above: `eager.py`, which opens it where there is a GPU. Below: the model in few launches (`fused.py`), or where that
does not know it, transformers' definition with our attention in place.

A decode step launches dozens of kernels for each layer, most of which take microseconds: less than launching them from
Python does. A recorded step reads its inputs from fixed memory (`_Frame`), so a replay is a copy and a launch. Batches
are padded to the next recorded size with copies of their last row, which write what is there already. The rows of a
draft are rows like others: each sees its sequence up to itself. What does not fit runs unrecorded beside it, over the
same cache: prompts fused, pictures through the definition.

Fused or not, recorded steps are compared with the definition before anybody is served (`open_graphed`). Who does not
agree is not used: the definition is recorded instead, and if that fails, too, it serves as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from workers.text.attention import PagedCache
from workers.text.directory import LoadedModel
from workers.text.eager import ModelRunner
from workers.text.embeddings import overlaps
from workers.text.gpu.fused import FusedDecoder, fuse
from workers.text.gpu.layout import Layout, places_of, splits_on
from workers.text.gpu.paged_attention import MAX_HEAD_DIM
from workers.text.kv_cache import BLOCK_TOKENS, KVShape, blocks_for
from workers.text.native.runner import agree
from workers.text.packing import PackedStep
from workers.text.threads import Threads

log = logging.getLogger(__name__)

Forward = Callable[[], None]
Record = Callable[[Forward], Callable[[], None]]
"""Records a function that reads and writes fixed memory; returns what replays it."""

Fuse = Callable[[], FusedDecoder | None]

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# A draft's rows read their sequence's cache each for itself, which a prompt's had better not.
_MOST_ROWS_OF_ONE = 8
_MOST_DRAFTED_ROWS = 16
_PROBE_PROMPTS = (19, 12, 33)
_PROBE_STEPS = 3
_PROBE_CHUNK = 21


class CudaRecorder:
    """Records on the current device; see `Record`. Other threads may use the device meanwhile.

    One recording runs at a time and leaves nothing but what it wrote to fixed memory, so all share what they need for
    themselves. Once they are gone another recorder must record anew: what cuBLAS took while this one recorded may
    outlive its recordings, and then no further one can begin in their pool (torch before 2.13).

    Args:
        strict: refuse what waits for the device, which no recording may, before one begins: one that fails half-way
            leaves torch unable to give memory back. Holds for all threads meanwhile, so not while others serve.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._pool = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: cuBLAS keeps memory for each it sees

    def __call__(self, forward: Forward) -> Callable[[], None]:
        """Run it some times, so that everything is compiled and laid out, and record it."""
        aside = self._aside
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            forward()
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error" if self._strict else before)
            try:
                forward()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # so that a failure, too, comes back to it
            torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"),
        ):
            forward()
        replay: Callable[[], None] = graph.replay
        return replay

    @staticmethod
    def forget() -> None:
        """Give back what cuBLAS has set aside for recordings that are gone. It takes as much again when it needs it."""
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()


class _Frame:
    """A recorded step's inputs in fixed memory, for `size` rows. Pinned host memory mirrors what changes each step."""

    def __init__(self, size: int, max_blocks: int, cache: PagedCache) -> None:
        device = cache.device
        self._rows = torch.zeros((3, size), dtype=torch.long, device=device)
        self._host = torch.zeros((3, size), dtype=torch.long, pin_memory=device.type == "cuda")
        self._tables = torch.zeros((size, max_blocks), dtype=torch.int32, device=device)
        self._host_tables = torch.zeros((size, max_blocks), dtype=torch.int32, pin_memory=device.type == "cuda")
        self.tokens, positions, places = self._rows.unbind()
        self.layout = Layout(cache, places, positions, self._tables, num_singles=size, splits=splits_on(cache, size))
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fill(self, packed: PackedStep) -> None:
        """Take a step's rows in; the last one stands for those that are missing."""
        if self._copied is not None:
            self._copied.synchronize()  # the step before may have given no token, so that nobody waited for it
        rows = np.minimum(np.arange(self._host.shape[1]), len(packed.tokens) - 1)
        owners = np.repeat(packed.sequences[:, 3], packed.sequences[:, 1])
        self._host.numpy()[:] = np.stack([packed.tokens, packed.positions, places_of(packed)])[:, rows]
        self._rows.copy_(self._host, non_blocking=True)
        width = packed.tables.shape[1]
        self._host_tables.numpy()[:, :width] = packed.tables[owners[rows]]
        self._tables[:, :width].copy_(self._host_tables[:, :width], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


@dataclass(frozen=True, slots=True)
class _Recorded:
    frame: _Frame
    replay: Callable[[], None]


class GraphedRunner(ModelRunner):
    """A model whose decode steps are recorded: fused, where that can be, else transformers' definition.

    Args:
        fuse: makes the fused decoder over the weights, wherever they are then; None for the definition itself.
        max_blocks: most blocks of one sequence.
        max_running: most rows of a decode step that are worth a recording.
        record: how.
    """

    def __init__(
        self,
        model: Any,
        cache: PagedCache,
        threads: Threads,
        *,
        fuse: Fuse | None,
        max_blocks: int,
        max_running: int,
        record: Record | None = None,
    ) -> None:
        super().__init__(model, cache, threads)
        self._fuse = fuse
        self._max_blocks = max_blocks
        self._sizes = sizes_for(max(max_running, _MOST_DRAFTED_ROWS))
        self._given = record
        self._serves = False
        self._record: Record | None = None
        self._recorded: dict[int, _Recorded] = {}
        self._settle()

    def _settle(self) -> None:
        """Have what lies beside the weights, where they are now."""
        self._fused = self._fuse() if self._fuse is not None else None
        vocab_size = self._model.get_output_embeddings().weight.shape[0]
        self._logits = torch.empty((self._sizes[-1], vocab_size), device=self._cache.device)

    def _drop_recordings(self) -> None:
        self._recorded.clear()
        if isinstance(self._record, CudaRecorder):
            self._record.forget()
        self._record = None

    def _leave(self) -> None:
        """Let go of it."""
        self._drop_recordings()
        self._fused = None
        self._logits = torch.empty(0)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Which of the two is recorded."""
        return "graphs" if self._fused is None else "fused"

    @torch.inference_mode()
    def run_packed(self, packed: PackedStep) -> torch.Tensor:
        """Run one step, recorded if it is a decode step; see `workers.text.runner.Runner.run`."""
        if not has_only_tokens(packed):
            return super().run_packed(packed)
        size = next((size for size in self._sizes if size >= len(packed.tokens)), 0)
        wanted = packed.logit_rows
        if not size or packed.tables.shape[1] > self._max_blocks or packed.sequences[:, 1].max() > _MOST_ROWS_OF_ONE:
            if self._fused is None:
                return super().run_packed(packed)
            return self._fused(self._there(packed.tokens), self._laid_out(packed), self._there(wanted))
        recorded = self._recorded.get(size)
        if recorded is None:
            recorded = self._new(size, packed)
        else:
            recorded.frame.fill(packed)
        recorded.replay()
        # A copy: the next replay overwrites the original.
        if np.array_equal(wanted, np.arange(len(wanted))):
            return self._logits[: len(wanted)].clone()
        return self._logits[self._there(wanted)]

    def _there(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._cache.device, torch.long)

    def _laid_out(self, packed: PackedStep) -> Layout:
        return Layout.of(packed, self._cache)

    def _new(self, size: int, packed: PackedStep) -> _Recorded:
        """Record a size. Warming up runs the step itself, which may be run again: it writes the same again."""
        frame = _Frame(size, self._max_blocks, self._cache)
        frame.fill(packed)

        def forward() -> None:
            if self._fused is not None:
                logits = self._fused(frame.tokens, frame.layout)
            else:
                logits = self._forward({"input_ids": frame.tokens[None]}, frame.layout.positions[None], frame.layout, 0)
            self._logits[:size].copy_(logits)

        if self._record is None:
            self._record = self._given or CudaRecorder(strict=not self._serves)
        self._recorded[size] = _Recorded(frame, self._record(forward))
        return self._recorded[size]

    def record_all(self) -> None:
        """Record every size, the largest first, before anybody is served: whoever needs one first would wait for it."""
        for size in reversed(self._sizes):
            self.run_packed(_decode_step([0] * size, [0] * size, [[0]] * size))
        self._serves = True

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> None:
        """Have a cache of so many blocks; recordings of the old one are dropped, and made anew as they are needed."""
        self._drop_recordings()
        super().resize(num_blocks, kept)

    def move_to_host(self, facts: object) -> str:
        """Bring the weights to host memory; recordings go, and so does what shares weights with the module."""
        self._leave()
        return super().move_to_host(facts)

    def move_to_device(self, kv: KVShape, device: torch.device) -> None:
        """Bring them back, and fuse them anew."""
        super().move_to_device(kv, device)
        self._settle()

    def close(self) -> None:
        """Let go of everything."""
        self._leave()
        self._fuse = None
        super().close()


def sizes_for(max_running: int) -> tuple[int, ...]:
    """Return the batch sizes to record, so that at most `max_running` rows and their padding fit into one of them."""
    last = next((index for index, size in enumerate(_SIZES) if size >= max_running), len(_SIZES) - 1)
    return _SIZES[: last + 1]


def has_only_tokens(packed: PackedStep) -> bool:
    """Whether nothing but the model's own weights and tokens goes into a step: no pictures, no adapters."""
    return packed.adapters is None and not any(
        work.sequence.rope is not None or overlaps(work.sequence.embeddings, work.start, work.end)
        for _, work in packed.placed
    )


def agrees(runner: ModelRunner, reference: ModelRunner, vocab_size: int) -> bool:
    """Return whether two runners make the same of prompts and decode steps. Uses the first blocks of both caches.

    Raises:
        RuntimeError, torch.OutOfMemoryError: what the recording raises.
    """
    steps = probe(vocab_size)
    got, expected = (torch.cat([one.run_packed(step) for step in steps]) for one in (runner, reference))
    return agree(got, expected, "bfloat16")


def probe(vocab_size: int) -> list[PackedStep]:
    """Return a prompt for each of three sequences, steps that decode all, two, and all again, one with a draft, and one
    that goes on with a prompt beside a sequence that decodes."""
    draws = np.random.default_rng(0)
    tables, first = [], 0
    for length in _PROBE_PROMPTS:
        num_blocks = _probe_blocks(length)
        tables.append(list(range(first, first + num_blocks)))
        first += num_blocks
    steps = [_prompt_step(draws.integers(0, vocab_size, n), 0, t) for n, t in zip(_PROBE_PROMPTS, tables, strict=True)]
    lengths = list(_PROBE_PROMPTS)
    for rows in (3, 2, 3):
        tokens = draws.integers(0, vocab_size, rows).tolist()
        steps.append(_decode_step(tokens, lengths[:rows], tables[:rows]))
        lengths = [length + (row < rows) for row, length in enumerate(lengths)]
    steps.append(_prompt_step(draws.integers(0, vocab_size, 3), lengths[0], tables[0]))
    steps.append(
        _beside(
            _decode_step(draws.integers(0, vocab_size, 1).tolist(), lengths[1:2], tables[1:2]),
            _prompt_step(draws.integers(0, vocab_size, _PROBE_CHUNK), lengths[2], tables[2]),
        )
    )
    return steps


def _probe_blocks(length: int) -> int:
    return (length + 2 * _PROBE_STEPS + _PROBE_CHUNK) // BLOCK_TOKENS + 1


PROBE_BLOCKS = sum(map(_probe_blocks, _PROBE_PROMPTS))


def _prompt_step(tokens: np.ndarray[Any, Any], start: int, table: Sequence[int]) -> PackedStep:
    rows = np.arange(len(tokens), dtype=np.int32)
    return PackedStep(
        tokens=tokens.astype(np.int32),
        positions=rows + start,
        sequences=np.asarray([[0, len(tokens), start, 0]], np.int32),
        tables=np.asarray([table], np.int32),
        logit_rows=rows,
        num_singles=0,
    )


def _decode_step(tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]) -> PackedStep:
    rows = np.arange(len(tokens), dtype=np.int32)
    widest = max(map(len, tables))
    return PackedStep(
        tokens=np.asarray(tokens, np.int32),
        positions=np.asarray(positions, np.int32),
        sequences=np.stack([rows, np.ones_like(rows), np.asarray(positions, np.int32), rows], axis=1),
        tables=np.asarray([[*table, *[0] * (widest - len(table))] for table in tables], np.int32),
        logit_rows=rows,
        num_singles=len(tokens),
    )


def _beside(one: PackedStep, other: PackedStep) -> PackedStep:
    """Return the step of both: `one` has single rows only, `other` one work of several."""
    num_rows, num_works = len(one.tokens), len(one.sequences)
    widest = max(one.tables.shape[1], other.tables.shape[1])
    return PackedStep(
        tokens=np.concatenate([one.tokens, other.tokens]),
        positions=np.concatenate([one.positions, other.positions]),
        sequences=np.concatenate(
            [one.sequences, other.sequences + np.asarray([[num_rows, 0, 0, num_works]], np.int32)]
        ),
        tables=np.concatenate([np.pad(t, ((0, 0), (0, widest - t.shape[1]))) for t in (one.tables, other.tables)]),
        logit_rows=np.concatenate([one.logit_rows, other.logit_rows + np.int32(num_rows)]),
        num_singles=one.num_singles,
    )


def open_graphed(loaded: LoadedModel, threads: Threads, max_running: int) -> ModelRunner | None:
    """Return a runner whose decode steps are recorded and proved against the definition; None where that cannot be."""
    if loaded.kv.head_dim > MAX_HEAD_DIM or loaded.kv.num_blocks < PROBE_BLOCKS:
        return None
    fused = partial(fuse, loaded.decoder, loaded.head, loaded.text_config)
    return _opened(loaded, threads, max_running, fused) or _opened(loaded, threads, max_running, None)


def _opened(loaded: LoadedModel, threads: Threads, max_running: int, fuse: Fuse | None) -> ModelRunner | None:
    what = "definition" if fuse is None else "fused"
    try:
        runner = GraphedRunner(
            loaded.model,
            PagedCache(loaded.kv, loaded.dtype, loaded.device),
            threads,
            fuse=fuse,
            max_blocks=blocks_for(loaded.kv.max_context_tokens),
            max_running=max_running,
        )
        if agrees(runner, reference_for(loaded), loaded.facts.vocab_size):
            runner.record_all()
            return runner
        log.warning("not recorded", extra={"what": what, "reason": "it differs from the model's definition"})
    except Exception as reason:  # Triton and recordings fail in many ways; the definition itself still serves.
        log.warning("not recorded", extra={"what": what, "reason": str(reason)[:500]})
    return None


def reference_for(loaded: LoadedModel) -> ModelRunner:
    """Return a plain runner with a cache that holds the probe."""
    kv = loaded.kv
    shape = KVShape(kv.num_layers, kv.num_kv_heads, kv.head_dim, PROBE_BLOCKS, PROBE_BLOCKS * BLOCK_TOKENS)
    return ModelRunner(loaded.model, PagedCache(shape, loaded.dtype, loaded.device), Threads(1, 1))
