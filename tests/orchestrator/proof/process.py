"""One worker process as it really is, whatever anybody believes of it.

Above it: the world, which bears and ends processes, and the effects, which call them. Below it: the loop, the lifecycle
contract's heartbeat.

What was begun goes on when its caller has gone: a load ends, a sleep ends, a process is born. That is how it is with
processes, and where most mistakes are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any

from hostler.errors import HostlerError, WorkerLost
from hostler.lifecycle.v1 import lifecycle_pb2 as life

from .loop import VirtualLoop
from .shapes import Kind

KEEPALIVE_S = 2.5
"""A call to a frozen process fails after so long."""


class Phase(Enum):
    """What a process does. The first two and the last hold nothing on a device."""

    BLANK = "blank"
    ASLEEP = "asleep"
    LOADING = "loading"
    READY = "ready"
    RESTING = "resting"
    WAKING = "waking"
    DRAINING = "draining"
    FAILED = "failed"
    DEAD = "dead"

    @property
    def holds(self) -> bool:
        """True while it may hold memory of its devices."""
        return self not in (Phase.BLANK, Phase.ASLEEP, Phase.DEAD)


_STATES = {
    Phase.BLANK: life.WORKER_STATE_BLANK,
    Phase.ASLEEP: life.WORKER_STATE_ASLEEP,
    Phase.LOADING: life.WORKER_STATE_LOADING,
    Phase.READY: life.WORKER_STATE_READY,
    Phase.RESTING: life.WORKER_STATE_DRAINING,
    Phase.WAKING: life.WORKER_STATE_LOADING,
    Phase.DRAINING: life.WORKER_STATE_DRAINING,
    Phase.FAILED: life.WORKER_STATE_FAILED,
}

Reports = asyncio.Queue[life.WatchResponse | HostlerError | None]


class Process:
    """A living worker process.

    Attributes:
        devices: those that it can see, by their ids; they never change once it has looked at one.
        kv_bytes: what it was last told that its KV cache may grow to.
        unsound: something was done to it that gives the scheduler a right to end it.
        doomed: its end was asked for.
        drained_until_s: until when its requests may go on although it was told to drain.
        frozen_ticks_s: how long it has been silent, as a watcher that owns up to its own stalls counts.
    """

    def __init__(self, loop: VirtualLoop, worker_id: str, node: str, pid: int) -> None:
        self.loop = loop
        self.id, self.node, self.pid = worker_id, node, pid
        self.phase = Phase.BLANK
        self.generation = 0
        self.kind: Kind | None = None
        self.devices: tuple[str, ...] = ()
        self.kv_bytes = 0
        self.max_running = 0
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.frozen = self.hung = self.unsound = self.doomed = False
        self.drained_until_s = float("inf")
        self.frozen_ticks_s = self.frozen_at_s = 0.0
        self.num_freezes = 0
        self.requests: set[object] = set()
        self.streams: list[Reports] = []
        self.calls: set[asyncio.Future[Any]] = set()
        self.when_idle: list[Callable[[], None]] = []

    @property
    def model(self) -> str:
        return self.kind.name if self.kind else ""

    @property
    def alive(self) -> bool:
        return self.phase is not Phase.DEAD

    @property
    def num_running(self) -> int:
        return min(len(self.requests), self.max_running)

    @property
    def kv_held_bytes(self) -> int:
        """What running requests hold of the KV cache, at least."""
        return self.kv_bytes * self.num_running // max(1, 2 * self.max_running)

    # ------------------------------------------------------------ heartbeats

    def report(self) -> life.WatchResponse:
        """Return what it says of itself now."""
        kind = self.kind
        said = life.WatchResponse(
            state=_STATES[self.phase],
            generation=self.generation,
            pid=self.pid,
            num_steps=self.num_steps,
            num_running=self.num_running,
            num_queued=len(self.requests) - self.num_running,
            max_running=self.max_running,
            num_prompt_tokens_total=self.num_prompt_tokens,
        )
        if kind is not None and self.phase is not Phase.LOADING:
            said.info.model = kind.name
            if self.phase is Phase.ASLEEP:
                said.host_bytes = kind.own_bytes
                said.shelf = self.id if len(self.devices) == 1 else ""
            elif self.phase is Phase.READY:
                said.kv_used_bytes = self.kv_held_bytes
                said.kv_reserved_bytes = self.kv_bytes
                said.kv_allocated_bytes = self.kv_bytes if self.num_running == self.max_running else self.kv_held_bytes
                said.device_bytes = said.peak_device_bytes = kind.own_bytes + said.kv_allocated_bytes
        return said

    def say(self) -> None:
        """Send a heartbeat to everybody who listens."""
        if self.streams and not self.frozen and self.alive:
            said = self.report()
            for stream in self.streams:
                stream.put_nowait(said)

    def beat(self) -> None:
        """Do half a second's work."""
        if self.requests and not self.hung and not self.frozen:
            self.num_steps += 1
        self.say()

    def listen(self) -> Reports:
        """Return a new stream of heartbeats; the first comes at once."""
        stream: Reports = asyncio.Queue()
        self.streams.append(stream)
        if self.frozen:
            self.loop.call_later(KEEPALIVE_S, self._keepalive, stream, self.num_freezes)
        else:
            stream.put_nowait(self.report())
        return stream

    def _keepalive(self, stream: Reports, freeze: int) -> None:
        """Break a stream whose other end was stopped all the while."""
        if self.frozen and self.num_freezes == freeze and stream in self.streams:
            self.streams.remove(stream)
            stream.put_nowait(WorkerLost("it does not answer"))

    def break_streams(self) -> None:
        """End every stream of heartbeats, as a network does."""
        self.unsound = True
        streams, self.streams = self.streams, []
        for stream in streams:
            stream.put_nowait(WorkerLost("the stream broke"))

    # ------------------------------------------------------------ calls

    async def call(self, seconds: float) -> None:
        """Take `seconds` over a call. Cancelling ends the wait only.

        Raises:
            WorkerLost: the process died, or is frozen for longer than a connection bears.
        """
        if not self.alive:
            raise WorkerLost("no such process")
        future = self.loop.create_future()
        self.calls.add(future)
        timer = self.loop.call_later(seconds, self._reply, future, 0.0)
        try:
            await future
        finally:
            self.calls.discard(future)
            timer.cancel()

    def _reply(self, future: asyncio.Future[Any], frozen_s: float) -> None:
        if future.done():
            return
        if not self.frozen:
            future.set_result(None)
        elif frozen_s >= KEEPALIVE_S:
            future.set_exception(WorkerLost("it does not answer"))
        else:
            self.loop.call_later(0.5, self._reply, future, frozen_s + 0.5)

    async def wait(self, future: asyncio.Future[Any]) -> Any:
        """Wait for something that only this process can bring about.

        Raises:
            WorkerLost: the process died.
        """
        if not self.alive:
            raise WorkerLost("no such process")
        self.calls.add(future)
        try:
            return await future
        finally:
            self.calls.discard(future)

    # ------------------------------------------------------------ life

    def become(self, phase: Phase) -> None:
        """Change, and say so."""
        if self.alive:
            self.phase = phase
            self.say()

    def freeze(self) -> None:
        self.frozen = self.unsound = True
        self.frozen_ticks_s, self.frozen_at_s = 0.0, self.loop.time()
        self.num_freezes += 1
        for stream in self.streams:
            self.loop.call_later(KEEPALIVE_S, self._keepalive, stream, self.num_freezes)

    def tick(self, counted_s: float) -> None:
        """Count the silence between two ticks; it may have begun between them."""
        if self.frozen:
            self.frozen_ticks_s += min(counted_s, self.loop.time() - self.frozen_at_s)

    def thaw(self) -> None:
        self.frozen = self.hung = False
        self.say()

    def die(self) -> None:
        """End, with everything that was going on in it."""
        if not self.alive:
            return
        self.phase = Phase.DEAD
        self.requests.clear()
        streams, self.streams = self.streams, []
        for stream in streams:
            stream.put_nowait(WorkerLost("the process ended"))
        for future in list(self.calls):
            if not future.done():
                future.set_exception(WorkerLost("the process ended"))
        self._tell_idle()

    # ------------------------------------------------------------ requests

    def begin_request(self, request: object) -> bool:
        """Take a request in, unless it may not have one now."""
        if self.phase is not Phase.READY or self.frozen:
            return False
        self.requests.add(request)
        self.num_prompt_tokens += 10
        self.say()
        return True

    def end_request(self, request: object) -> None:
        if request in self.requests:
            self.requests.discard(request)
            self.num_steps += 1
            self.say()
            if not self.requests:
                self._tell_idle()

    def once_idle(self, then: Callable[[], None]) -> None:
        """Call back when no request runs in it, or when it is dead."""
        if self.requests and self.alive:
            self.when_idle.append(then)
        else:
            then()

    def _tell_idle(self) -> None:
        waiting, self.when_idle = self.when_idle, []
        for then in waiting:
            then()
