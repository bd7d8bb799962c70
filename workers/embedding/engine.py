"""The engine for embeddings and reranking: texts of all requests in one queue, lanes that run them in batches.

Above: the worker's servicers, through `workers.engine.Engine` and `workers.vectors`. Below: `batching.py` (who runs
together), `models.py` (the model). A lane is a thread with threads of torch of its own: two batches side by side keep
two cores at work, where one batch over both would wait at a hundred barriers for whoever else takes a core. The
asyncio side submits and waits for futures.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from hostler.errors import (
    HostlerError,
    Internal,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    Unavailable,
)

from workers.embedding.batching import choose_batch
from workers.embedding.models import SequenceModel, TokenSequence
from workers.embedding.recipe import Recipe
from workers.embedding.texts import TextEncoder
from workers.engine import EngineStats, Event, GenerationRequest, LoadSpec, ModelFacts, Prompt
from workers.vectors import Embedded, EmbeddingRequest, Ranked, RankingRequest, Vectors

log = logging.getLogger(__name__)

MAX_BATCH_TEXTS = 256
# A GPU needs more tokens than a CPU before its products are bound by arithmetic.
_GPU_BATCH = 16
_CPU_LANES = 2
# Fewer tokens than these do not fill a core's arithmetic: they are not shared out among idle lanes.
_WORTH_A_BATCH = 128
_SWITCH_INTERVAL_S = 0.0002


@dataclass(eq=False, slots=True)
class _Job:
    """One request's sequences on their way through the model. `cancelled` may be set by any thread."""

    request_id: str
    done: asyncio.Future[Vectors]
    vectors: Vectors
    num_left: int
    cancelled: bool = False
    began: bool = False


@dataclass(frozen=True, slots=True)
class _Item:
    job: _Job
    index: int
    sequence: TokenSequence = field(repr=False)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what goes with it.

    Attributes:
        scores_pairs: it is a cross-encoder, not an embedding model.
        recipe: prompts of an embedding model.
        is_reentrant: several threads may run the model at once.
    """

    model: SequenceModel
    encoder: TextEncoder
    decode: Callable[[Sequence[int]], str]
    facts: ModelFacts
    recipe: Recipe
    scores_pairs: bool
    on_gpu: bool
    is_reentrant: bool


class EmbeddingEngine:
    """Batches one embedding model or cross-encoder. Create and use in one asyncio loop.

    Args:
        loaded: the model.
        spec: limits; `prefill_chunk_tokens` bounds a batch, padding included (on a GPU, 16 times as many).
    """

    def __init__(self, loaded: Loaded, spec: LoadSpec) -> None:
        self._loaded = loaded
        self._spec = spec
        self._asyncio = asyncio.get_running_loop()
        self._max_batch_tokens = spec.prefill_chunk_tokens * (_GPU_BATCH if loaded.on_gpu else 1)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._jobs: set[_Job] = set()
        self._num_requests = 0
        self._changed: Callable[[], None] = lambda: None
        self._num_steps = 0
        self._num_tokens = 0
        self._waiting: deque[_Item] = deque()
        self._num_tokens_running = 0
        self._changed_queue = threading.Condition()
        self._closing = False
        # Every operator takes the interpreter lock again; at Python's 5 ms a busy asyncio thread would hold a batch up
        # a hundred times.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        cores = spec.num_threads or len(os.sched_getaffinity(0))
        num_lanes = min(_CPU_LANES, cores) if loaded.is_reentrant and not loaded.on_gpu else 1
        self._num_idle = num_lanes
        self._lanes = [
            threading.Thread(target=self._run_lane, args=(cores // num_lanes,), name=f"lane-{number}", daemon=True)
            for number in range(num_lanes)
        ]
        for lane in self._lanes:
            lane.start()

    # ------------------------------------------------------------ asyncio side

    @property
    def facts(self) -> ModelFacts:
        """What the model is."""
        return self._loaded.facts

    def stats(self) -> EngineStats:
        """Counters as of now; running are the requests with a text in the model, or through it."""
        running = sum(job.began for job in self._jobs)
        return EngineStats(
            num_steps=self._num_steps,
            num_running=running,
            num_queued=self._num_requests - running,
            max_running=self._spec.max_running,
            num_prompt_tokens_total=self._num_tokens,
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop whenever running or queued counts change."""
        self._changed = callback

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        """Return one vector for each input; see `workers.vectors.Embedder.embed`."""
        loaded = self._loaded
        if loaded.scores_pairs:
            raise InvalidRequest("This model ranks documents; it makes no embeddings.", param="model")
        width = loaded.model.width
        if request.dimensions is not None and not 0 < request.dimensions <= width:
            raise InvalidRequest(
                f"Invalid 'dimensions': the model's vectors have {width} numbers, {request.dimensions} are asked for.",
                param="dimensions",
            )
        if not request.inputs:
            raise InvalidRequest("There is no input.", param="input")
        sequences, vectors = await self._serve(
            lambda: loaded.encoder.inputs(request.inputs, loaded.recipe.prompt), request.request_id
        )
        if request.dimensions is not None and request.dimensions < width:
            vectors = normalized(vectors[:, : request.dimensions])
        return Embedded(vectors, _num_tokens(sequences))

    async def rank(self, request: RankingRequest) -> Ranked:
        """Return one score for each document; see `workers.vectors.Ranker.rank`.

        A cross-encoder reads query and document together. Of an embedding model it is the cosine of their vectors, put
        between 0 and 1 as (1 + cosine) / 2, which keeps the order.
        """
        loaded, documents = self._loaded, request.documents
        if not documents:
            raise InvalidRequest("There are no documents.", param="documents")
        if loaded.scores_pairs:
            sequences, scores = await self._serve(
                lambda: loaded.encoder.pairs(request.query, documents), request.request_id
            )
            return Ranked(scores[:, 0].tolist(), _num_tokens(sequences))
        recipe = loaded.recipe

        def encode() -> list[TokenSequence]:
            query = loaded.encoder.query(request.query, recipe.query_prompt)
            return [query, *loaded.encoder.documents(documents, recipe.document_prompt)]

        sequences, vectors = await self._serve(encode, request.request_id)
        directions = normalized(vectors)
        cosines = np.clip(directions[1:] @ directions[0], -1.0, 1.0)
        return Ranked(((1.0 + cosines) / 2.0).tolist(), _num_tokens(sequences))

    async def _serve(
        self, encode: Callable[[], list[TokenSequence]], request_id: str
    ) -> tuple[list[TokenSequence], Vectors]:
        """Tokenize and run one request's texts, among everybody's."""
        if self._num_requests >= self._spec.max_running + self._spec.max_queued:
            raise Overloaded(f"{self._num_requests} requests are already running or queued. Try again later.")
        self._num_requests += 1
        self._changed()
        try:
            sequences = await self._asyncio.run_in_executor(self._encoding, encode)
            if self._closing:
                raise Unavailable("This model is being unloaded. Try again.")
            return sequences, await self._run(sequences, request_id)
        finally:
            self._num_requests -= 1
            self._changed()

    async def _run(self, sequences: Sequence[TokenSequence], request_id: str) -> Vectors:
        vectors = np.empty((len(sequences), self._loaded.model.width), np.float32)
        job = _Job(request_id, self._asyncio.create_future(), vectors, len(sequences))
        self._jobs.add(job)
        try:
            with self._changed_queue:
                self._waiting.extend(_Item(job, index, sequence) for index, sequence in enumerate(sequences))
                self._changed_queue.notify(len(sequences))
            return await job.done
        finally:
            job.cancelled = True
            self._jobs.discard(job)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Refuse: such a model writes no text."""
        kind = "ranks documents" if self._loaded.scores_pairs else "makes embeddings"
        raise InvalidRequest(f"This model {kind}; it does not write text.", param="model")
        yield

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the prompt's token ids."""
        return await self._asyncio.run_in_executor(self._encoding, self._loaded.encoder.prompt, prompt)

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return await self._asyncio.run_in_executor(self._encoding, self._loaded.decode, list(ids))

    async def close(self) -> None:
        """Fail what still runs, end the lanes."""
        self._closing = True
        with self._changed_queue:
            self._changed_queue.notify_all()
        for lane in self._lanes:
            await asyncio.to_thread(lane.join, 10.0)
        self._encoding.shutdown(wait=False)
        for job in list(self._jobs):
            _fail(job, Unavailable("This model was unloaded while it answered. Try again."))

    # ------------------------------------------------------------ lanes

    def _run_lane(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        while batch := self._next_batch():
            self._tell(self._begin, batch)
            results = self._results(batch)
            with self._changed_queue:
                self._num_idle += 1
                self._num_tokens_running -= _num_padded(batch)
                self._changed_queue.notify_all()
            for part in results:
                self._tell(self._deliver, *part)

    def _next_batch(self) -> list[_Item]:
        """Wait for texts and for room to run them, and take those out that are next; none at the end."""
        with self._changed_queue:
            while not self._closing:
                if batch := self._take():
                    self._num_idle -= 1
                    self._num_tokens_running += _num_padded(batch)
                    return batch
                self._changed_queue.wait()
            return []

    def _take(self) -> list[_Item]:
        """Take the next batch out of the queue, the eldest text with it; what is idle gets an equal share of little.

        A text longer than a batch may be runs all the same, one longer than all lanes' batches when nothing else does.
        """
        waiting = [item for item in self._waiting if not item.job.cancelled]
        self._waiting = deque(waiting)
        lengths = [len(item.sequence.ids) for item in waiting]
        room = self._max_batch_tokens * len(self._lanes) - self._num_tokens_running
        if not waiting or (self._num_tokens_running and lengths[0] > room):
            return []
        share = min(room, self._max_batch_tokens)
        if self._num_idle > 1:
            share = min(share, max(_WORTH_A_BATCH, sum(lengths) // self._num_idle))
        chosen = set(choose_batch(lengths, share, MAX_BATCH_TEXTS))
        self._waiting = deque(item for index, item in enumerate(waiting) if index not in chosen)
        return [waiting[index] for index in sorted(chosen)]

    def _results(self, batch: list[_Item]) -> list[tuple[list[_Item], Vectors | HostlerError]]:
        """Run a batch; where it fails, each text alone, so that only the culprit's request fails."""
        outcome = self._attempt(batch)
        if len(batch) == 1 or not isinstance(outcome, HostlerError):
            return [(batch, outcome)]
        return [([item], self._attempt([item])) for item in batch]

    def _attempt(self, batch: list[_Item]) -> Vectors | HostlerError:
        try:
            return self._loaded.model.run([item.sequence for item in batch])
        except Exception as error:  # any failure of the model must cost one request, never the engine
            log.exception("batch failed", extra={"num_texts": len(batch), "request_id": batch[0].job.request_id})
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                return OutOfMemory("Memory ran out while this request was served. Try again, or with shorter texts.")
            return Internal("The model failed on this request; the server's log has the details.")

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        if not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(callback, *arguments)

    # ------------------------------------------------------------ back in the loop

    def _begin(self, batch: list[_Item]) -> None:
        for item in batch:
            item.job.began = True
        self._changed()

    def _deliver(self, batch: list[_Item], outcome: Vectors | HostlerError) -> None:
        self._num_steps += 1
        for row, item in enumerate(batch):
            job = item.job
            if isinstance(outcome, HostlerError):
                _fail(job, outcome)
                continue
            if not np.isfinite(outcome[row]).all():
                _fail(job, Internal("The model produced no valid numbers for this request."))
                continue
            self._num_tokens += len(item.sequence.ids)
            job.vectors[item.index] = outcome[row]
            job.num_left -= 1
            if not job.num_left and not job.done.done():
                job.done.set_result(job.vectors)


def _num_padded(batch: Sequence[_Item]) -> int:
    """Return the tokens that a batch takes, padding included."""
    return len(batch) * max(len(item.sequence.ids) for item in batch)


def normalized(vectors: Vectors) -> Vectors:
    """Return vectors (n, width) with length 1."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = vectors / np.maximum(lengths, np.float32(1e-12))
    return unit


def _fail(job: _Job, error: HostlerError) -> None:
    job.cancelled = True
    if not job.done.done():
        job.done.set_exception(error)


def _num_tokens(sequences: Sequence[TokenSequence]) -> int:
    return sum(len(sequence.ids) for sequence in sequences)
