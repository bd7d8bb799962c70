"""What one worker process is: its identity, its state, its engine. The servicers stand above, engines below.

    BLANK ──Load──► LOADING ──► READY ──Sleep──► DRAINING ──► ASLEEP ──Wake──► LOADING ──► READY
                       └──────────────────────────── what fails on the way ──────────────► FAILED

A blank worker may have generation 0: it was started ahead, and the first Load gives it a generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hostler.errors import (
    HostlerError,
    InvalidRequest,
    ModelLoadFailed,
    OutOfMemory,
    StaleGeneration,
    Unavailable,
    UnsupportedParameter,
)
from hostler.lifecycle.v1 import lifecycle_pb2 as life

from workers import memory
from workers.engine import Engine, EngineStats, LoadSpec, ModelFacts, Resizable, Sleeper
from workers.environment import enter_environment
from workers.gentle import gently
from workers.openers import IMPORTS, Report
from workers.refusals import refuse_beams
from workers.scripted import ScriptedEngine

log = logging.getLogger(__name__)

T = TypeVar("T")

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
        generation: of this placement; messages of any other are refused. 0: until a load claims it.
    """

    def __init__(self, worker_id: str, generation: int) -> None:
        self.worker_id = worker_id
        self.generation = generation
        self.state: life.WorkerState.ValueType = life.WORKER_STATE_BLANK
        self.failure = ""
        self.shelf = ""
        self.ended = asyncio.Event()
        self.memory = memory.MemoryMeter()
        self.keep_alive_ms: int | None = None
        self._engine: Engine | None = None
        self._spec: LoadSpec | None = None
        self._kind: life.EngineKind.ValueType = life.ENGINE_KIND_UNSPECIFIED
        self._facts: ModelFacts | None = None
        self._leaving = False
        self._num_calls = 0
        self._change = asyncio.Condition()
        self._version = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._notifying: asyncio.Task[None] | None = None

    def check_generation(self, value: str | None) -> None:
        """Refuse a message that names another generation.

        Raises:
            StaleGeneration: not ours.
        """
        if value is not None and value != str(self.generation):
            raise StaleGeneration(f"This worker is generation {self.generation}; the message is for {value[:20]}.")

    def claim(self, value: str | None) -> None:
        """Take the generation of a load, if nobody gave this worker one; else as `check_generation`.

        Raises:
            StaleGeneration: it has another.
        """
        if self.generation == 0 and value is not None and value.isdecimal() and len(value) < 20:
            self.generation = int(value)
            log.info("worker claimed", extra={"worker_id": self.worker_id, "generation": self.generation})
        self.check_generation(value)

    @property
    def engine(self) -> Engine:
        """The engine, when it may take requests.

        Raises:
            Unavailable: none is loaded, or the worker is draining or asleep.
        """
        if self._engine is None or self.state != life.WORKER_STATE_READY:
            raise Unavailable("This worker is not serving now. Try again.")
        return self._engine

    @contextlib.contextmanager
    def serving(self) -> Iterator[Engine]:
        """Give out the engine for one call; until it ends the worker neither sleeps nor says that it is drained.

        Raises:
            Unavailable: as `engine`.
        """
        engine = self.engine
        self._num_calls += 1
        try:
            yield engine
        finally:
            self._num_calls -= 1
            self.changed()

    @property
    def facts(self) -> ModelFacts | None:
        """What the model is, once there is one, also while it sleeps."""
        return self._engine.facts if self._engine is not None else self._facts

    def stats(self) -> EngineStats:
        """The engine's counters; nothing where there is none."""
        return self._engine.stats() if self._engine is not None else EngineStats()

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

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run what must come to its end even if the call that asked for it is cancelled."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ------------------------------------------------------------ load, sleep, wake, resize

    async def load(
        self, spec: LoadSpec, kind: life.EngineKind.ValueType, environment: Mapping[str, str] | None = None
    ) -> AsyncIterator[LoadStage]:
        """Load the one model; yields progress, returns when ready. Whoever stops listening does not stop the load.

        Args:
            spec: what to load.
            kind: which engine runs it.
            environment: variables for libraries that have not looked at them yet.

        Raises:
            HostlerError: the model cannot be loaded; the worker is FAILED and of no further use.
        """
        if self.state != life.WORKER_STATE_BLANK:
            raise InvalidRequest("This worker already has its model.")
        self._spec, self._kind = spec, kind
        stages: asyncio.Queue[LoadStage | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(stage: str, done_bytes: int, total_bytes: int) -> None:
            loop.call_soon_threadsafe(stages.put_nowait, LoadStage(stage, done_bytes, total_bytes))

        async def opened() -> Engine:
            enter_environment(environment or {})
            return await self._create(spec, kind, report)

        task = self._bring_up(opened(), spec)
        task.add_done_callback(lambda _: stages.put_nowait(None))
        while (stage := await stages.get()) is not None:
            yield stage
        await asyncio.shield(task)

    def _bring_up(self, opening: Coroutine[Any, Any, Engine], spec: LoadSpec) -> asyncio.Task[None]:
        """Go over LOADING to READY with the engine that `opening` returns, or to FAILED."""
        self._set_state(life.WORKER_STATE_LOADING)
        self.memory.begin(spec.devices)

        async def run() -> None:
            try:
                engine = await opening
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
            self._engine, self._spec = engine, spec
            engine.on_change(self.changed)
            self._set_state(life.WORKER_STATE_READY)

        return self._own(run())

    @staticmethod
    async def _create(spec: LoadSpec, kind: life.EngineKind.ValueType, report: Report) -> Engine:
        if kind == life.ENGINE_KIND_SCRIPTED:
            refuse_beams(spec, "scripted models")
            return ScriptedEngine(spec)
        importing = IMPORTS.get(kind)
        if importing is None:
            raise ModelLoadFailed(f"This version has no engine of kind {life.EngineKind.Name(kind)}.")
        report("import", 0, 0)
        opener = await gently(importing)
        return await opener(spec, report)

    async def sleep(self, deadline_s: float) -> tuple[int, int]:
        """Refuse new requests, wait for the running ones, free the device; return freed bytes and host bytes.

        One that sleeps already has freed nothing more.

        Raises:
            Unavailable: not ready, or requests still run after `deadline_s`: it serves as before.
        """
        if self.state == life.WORKER_STATE_ASLEEP:
            return 0, self.memory.look().host
        if self.state != life.WORKER_STATE_READY:
            raise Unavailable("This worker is not ready, so it cannot sleep.")
        self._set_state(life.WORKER_STATE_DRAINING)
        idle = False
        try:
            idle = await self._idle_within(deadline_s) == 0
        finally:
            if not idle:
                self._set_state(life.WORKER_STATE_DRAINING if self._leaving else life.WORKER_STATE_READY)
        if not idle:
            raise Unavailable(f"Requests were still running after {deadline_s:g} s; the model stays awake.")
        return await asyncio.shield(self._own(self._fall_asleep()))

    async def _fall_asleep(self) -> tuple[int, int]:
        engine = self._engine
        assert engine is not None
        self._facts = engine.facts
        before = self.memory.look()
        try:
            if isinstance(engine, Sleeper):
                self.shelf = await engine.sleep()
            else:
                self._engine = None
                await engine.close()
            del engine
            await gently(memory.give_back)
        except Exception:
            log.exception("falling asleep failed", extra={"worker_id": self.worker_id})
            self._set_state(life.WORKER_STATE_FAILED, "falling asleep failed")
            raise
        held = self.memory.look()
        self.memory.fell_asleep()
        self._set_state(life.WORKER_STATE_ASLEEP)
        return max(0, before.device - held.device), self.memory.look().host

    async def wake(self, devices: tuple[str, ...], kv_cache_bytes: int) -> None:
        """Bring the model back, perhaps to other devices; returns when it serves as before.

        Raises:
            Unavailable: it does not sleep.
            HostlerError: it cannot come back; the worker is FAILED and of no further use.
        """
        if self.state != life.WORKER_STATE_ASLEEP or self._spec is None:
            raise Unavailable("This worker does not sleep, so it cannot wake.")
        self.shelf = ""
        spec = replace(self._spec, devices=devices or self._spec.devices, kv_cache_bytes=kv_cache_bytes, shelf="")
        await asyncio.shield(self._bring_up(self._woken(spec), spec))

    async def _woken(self, spec: LoadSpec) -> Engine:
        if isinstance(self._engine, Sleeper):
            await self._engine.wake(spec)
            return self._engine
        return await self._create(spec, self._kind, lambda *_: None)

    async def resize(self, kv_cache_bytes: int) -> int:
        """Change what the KV cache may grow to; return what it became.

        Raises:
            Unavailable: not serving now.
            UnsupportedParameter: this engine has no cache.
        """
        engine = self.engine
        if not isinstance(engine, Resizable):
            raise UnsupportedParameter("This model has no KV cache, so there is nothing to resize.")
        resized = await asyncio.shield(self._own(engine.resize(kv_cache_bytes)))
        self.changed()
        return resized

    async def drain(self, deadline_s: float) -> int:
        """Refuse new requests; return how many still run after at most `deadline_s`."""
        self._leaving = True
        if self.state == life.WORKER_STATE_READY:
            self._set_state(life.WORKER_STATE_DRAINING)
        return await self._idle_within(deadline_s)

    async def _idle_within(self, deadline_s: float) -> int:
        """Wait until no request runs; return how many do after at most `deadline_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self._num_active():
                    await self.wait_change(self._version, 0.2)
        return self._num_active()

    def _num_active(self) -> int:
        stats = self.stats()
        return max(self._num_calls, stats.num_running + stats.num_queued)

    # ------------------------------------------------------------ watching, ending

    async def wait_change(self, seen: int, timeout_s: float) -> int:
        """Return the version once it differs from `seen`, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._change:
                await self._change.wait_for(lambda: self._version != seen)
        except TimeoutError:
            pass
        return self._version

    async def watch(self, interval_s: float) -> AsyncIterator[None]:
        """Yield at once, then on every change and at least each `interval_s`, until the worker ends.

        A stream that stayed open would hold the server's stop up for its whole grace.
        """
        while not self.ended.is_set():
            seen = self._version
            yield
            if await self.wait_change(seen, interval_s) != seen:
                await asyncio.sleep(_WATCH_SPACING_S)

    def end_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start `close` without waiting for it."""
        self._tasks.add(loop.create_task(self.close()))

    async def close(self) -> None:
        """End the engine and let the process end."""
        if self._engine is not None:
            await self._engine.close()
        self.ended.set()
        self.changed()
