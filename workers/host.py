"""What one worker process is: its identity, its state, its engine. The servicers stand above, engines below."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from hostler.errors import HostlerError, InvalidRequest, ModelLoadFailed, OutOfMemory, StaleGeneration, Unavailable
from hostler.lifecycle.v1 import lifecycle_pb2 as life

from workers.engine import Engine, LoadSpec
from workers.scripted import ScriptedEngine

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]
Opener = Callable[[LoadSpec, Report], Awaitable[Engine]]

# At most one watch message in this time, however often counts change.
_WATCH_SPACING_S = 0.05


@dataclass(frozen=True, slots=True)
class LoadStage:
    """Progress of a load, in bytes where the stage has them."""

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0


class WorkerHost:
    """State of one worker. Everything runs in its asyncio loop.

    Args:
        worker_id: names it in logs.
        generation: of this placement; messages of any other are refused.
    """

    def __init__(self, worker_id: str, generation: int) -> None:
        self.worker_id = worker_id
        self.generation = generation
        self.state: life.WorkerState.ValueType = life.WORKER_STATE_BLANK
        self.failure = ""
        self.ended = asyncio.Event()
        self._engine: Engine | None = None
        self._change = asyncio.Condition()
        self._version = 0
        self._notifying: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def check_generation(self, value: str | None) -> None:
        """Refuse a message that names another generation.

        Raises:
            StaleGeneration: not ours.
        """
        if value is not None and value != str(self.generation):
            raise StaleGeneration(f"This worker is generation {self.generation}; the message is for {value[:20]}.")

    @property
    def engine(self) -> Engine:
        """The engine, when it may take requests.

        Raises:
            Unavailable: none is loaded, or the worker is draining.
        """
        if self._engine is None or self.state != life.WORKER_STATE_READY:
            raise Unavailable("This worker is not serving now. Try again.")
        return self._engine

    @property
    def loaded(self) -> Engine | None:
        """The engine, whether or not it may take requests."""
        return self._engine

    def changed(self) -> None:
        """Tell every watcher that something changed."""
        self._version += 1
        if self._notifying is None or self._notifying.done():
            self._notifying = asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._change:
            self._change.notify_all()

    def _set_state(self, state: life.WorkerState.ValueType, failure: str = "") -> None:
        self.state, self.failure = state, failure
        self.changed()

    async def load(self, spec: LoadSpec, kind: life.EngineKind.ValueType) -> AsyncIterator[LoadStage]:
        """Load the one model; yields progress, returns when ready.

        Raises:
            HostlerError: the model cannot be loaded; the worker is FAILED and of no further use.
        """
        if self.state != life.WORKER_STATE_BLANK:
            raise InvalidRequest("This worker already has its model.")
        self._set_state(life.WORKER_STATE_LOADING)
        stages: asyncio.Queue[LoadStage | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(stage: str, done_bytes: int, total_bytes: int) -> None:
            loop.call_soon_threadsafe(stages.put_nowait, LoadStage(stage, done_bytes, total_bytes))

        task = asyncio.create_task(self._create(spec, kind, report))
        task.add_done_callback(lambda _: stages.put_nowait(None))
        try:
            while (stage := await stages.get()) is not None:
                yield stage
            self._engine = await task
        except HostlerError as error:
            self._set_state(life.WORKER_STATE_FAILED, error.message)
            raise
        except MemoryError as error:
            self._set_state(life.WORKER_STATE_FAILED, "out of memory")
            raise OutOfMemory(f"Memory ran out while {spec.model} was loaded.") from error
        except Exception as error:
            log.exception("load failed", extra={"model": spec.model})
            self._set_state(life.WORKER_STATE_FAILED, type(error).__name__)
            raise ModelLoadFailed(
                f"{spec.model} could not be loaded ({type(error).__name__}); see the worker's log."
            ) from error
        self._engine.on_change(self.changed)
        self._set_state(life.WORKER_STATE_READY)

    @staticmethod
    async def _create(spec: LoadSpec, kind: life.EngineKind.ValueType, report: Report) -> Engine:
        if kind == life.ENGINE_KIND_SCRIPTED:
            return ScriptedEngine(spec)
        importing = _IMPORTS.get(kind)
        if importing is None:
            raise ModelLoadFailed(f"This version has no engine of kind {life.EngineKind.Name(kind)}.")
        report("import", 0, 0)
        opener = await asyncio.to_thread(importing)
        return await opener(spec, report)

    async def drain(self, deadline_s: float) -> int:
        """Refuse new requests; return how many still run after at most `deadline_s`."""
        if self.state == life.WORKER_STATE_READY:
            self._set_state(life.WORKER_STATE_DRAINING)
        try:
            async with asyncio.timeout(deadline_s):
                while self._num_active():
                    await self.wait_change(self._version, 0.2)
        except TimeoutError:
            pass
        return self._num_active()

    def _num_active(self) -> int:
        if self._engine is None:
            return 0
        stats = self._engine.stats()
        return stats.num_running + stats.num_queued

    async def wait_change(self, seen: int, timeout_s: float) -> int:
        """Return the version once it differs from `seen`, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._change:
                await self._change.wait_for(lambda: self._version != seen)
        except TimeoutError:
            pass
        return self._version

    async def watch(self, interval_s: float) -> AsyncIterator[None]:
        """Yield at once, then on every change and at least each `interval_s`."""
        while True:
            seen = self._version
            yield
            if await self.wait_change(seen, interval_s) != seen:
                await asyncio.sleep(_WATCH_SPACING_S)

    def end_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start `close` without waiting for it."""
        self._closing = loop.create_task(self.close())

    async def close(self) -> None:
        """End the engine and let the process end."""
        if self._engine is not None:
            await self._engine.close()
        self.ended.set()


def _import_text_engine() -> Opener:
    """Import torch and transformers (seconds, in a thread) and return the text engine's opener."""
    from workers.text.opening import open_text_engine

    return open_text_engine


def _import_embedding_engine() -> Opener:
    from workers.embedding.opening import open_embedding_engine

    return open_embedding_engine


def _import_rerank_engine() -> Opener:
    from workers.embedding.opening import open_rerank_engine

    return open_rerank_engine


_IMPORTS: dict[life.EngineKind.ValueType, Callable[[], Opener]] = {
    life.ENGINE_KIND_UNSPECIFIED: _import_text_engine,
    life.ENGINE_KIND_TEXT: _import_text_engine,
    life.ENGINE_KIND_EMBEDDING: _import_embedding_engine,
    life.ENGINE_KIND_RERANK: _import_rerank_engine,
}


def resident_bytes() -> int:
    """Return this process's resident memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
