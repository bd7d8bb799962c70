"""One generation, from target to events: pick a replica, or have one brought up; retry what nobody has seen yet.

Above: routes; below: `routing`, `waiting`, `affinity`, `balance`, `channels`, `placement`, and the inference stubs
(only here and in `channels`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from hostler.channel import call_metadata
from hostler.errors import (
    Cancelled,
    HostlerError,
    ModelLoadFailed,
    Overloaded,
    StaleGeneration,
    Unavailable,
    WorkerLost,
    from_rpc_error,
)
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import speaking_pb2
from hostler.placement.v1 import placement_pb2

from gateway.affinity import Affinity, prefix_hashes
from gateway.balance import Load, choose
from gateway.channels import WorkerChannels
from gateway.keys.caller import current_caller
from gateway.keys.limits import KeyLimits
from gateway.metrics import Meter, Seen
from gateway.placement import PlacementClient
from gateway.routing import ReplicaKey, RouteTable, Target, key_of, ready_replicas
from gateway.waiting import WaitingRoom

if TYPE_CHECKING:
    from hostler.inference.v1.inference_pb2_grpc import InferenceServiceAsyncStub

log = logging.getLogger(__name__)

MAX_TRIES = 3
# A worker that dies is noticed by the orchestrator within its own time; until then the table still lists it.
GONE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Loading:
    """The model is being brought up for this request."""

    progress: placement_pb2.EnsureProgress


Event = Loading | pb.GenerateResponse
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
Method = Callable[["InferenceServiceAsyncStub"], grpc.aio.UnaryUnaryMultiCallable[Q, R]]
StreamMethod = Callable[["InferenceServiceAsyncStub"], grpc.aio.UnaryStreamMultiCallable[Q, R]]
Attempt = Callable[[placement_pb2.Replica], AsyncGenerator[R, None]]
_OPERATIONS: dict[type[Message], str] = {
    pb.EmbedRequest: "embeddings",
    pb.RerankRequest: "rerank",
    pb.TranscribeRequest: "transcription",
    speaking_pb2.SpeakRequest: "speech",
}


class Dispatcher:
    """Carries requests to workers.

    Args:
        max_waiting: model → how many requests may wait for it in this process.
        ensure_timeout_s: longest wait for a model that is not loaded.
        gone_timeout_s: longest wait, before a retry, for the table to drop a lost replica.
        limits: where the caller's tokens are counted.
    """

    def __init__(
        self,
        table: RouteTable,
        channels: WorkerChannels,
        placement: PlacementClient,
        meter: Meter,
        *,
        max_waiting: Callable[[str], int],
        ensure_timeout_s: float,
        gone_timeout_s: float = GONE_TIMEOUT_S,
        limits: KeyLimits | None = None,
    ) -> None:
        self._table = table
        self._channels = channels
        self._placement = placement
        self._meter = meter
        self._max_waiting = max_waiting
        self._room = WaitingRoom()
        self._limits = limits
        self._affinity = Affinity()
        self._ensure_timeout_s = ensure_timeout_s
        self._gone_timeout_s = gone_timeout_s

    async def generate(
        self, target: Target, request: pb.GenerateRequest, request_id: str, *, cache_scope: str
    ) -> AsyncGenerator[Event, None]:
        """Stream one choice. The last event is `finish`. Closing the generator cancels the worker's call at once.

        The caller's `cache_scope` (`doors.cache_scope_of`) is set in `request`: no generation goes without one. So is
        the target's adapter: no request for an adapter is answered by its base model.

        A worker that is lost before its first token costs the client nothing but time: up to three tries. After the
        first token nothing is ever repeated. A replica whose queue is full is as good as lost while another has room.

        Raises:
            Overloaded: too many wait, here or in the worker; says when to come back.
            HostlerError: from the worker, from the orchestrator, or for the loss of either.
        """
        request.cache_scope = cache_scope
        request.adapter = target.adapter
        attempt = self._generated(request, request_id)
        carried = self._carry(target, attempt, request, request_id, request)
        async with aclosing(carried) as events:
            async for event in events:
                yield event

    async def stream(
        self, target: Target, method: StreamMethod[Q, R], message: Q, request_id: str
    ) -> AsyncGenerator[Loading | R, None]:
        """Stream a worker's answers to a call that generates no text; the last has a `finish`. Otherwise as `generate`.

        Args:
            method: the stub's method to call with `message`.
        """
        attempt = self._streamed(method, message, request_id)
        async with aclosing(self._carry(target, attempt, message, request_id)) as events:
            async for event in events:
                yield event

    async def _carry(
        self,
        target: Target,
        attempt: Attempt[R],
        message: Message,
        request_id: str,
        generation: pb.GenerateRequest | None = None,
    ) -> AsyncGenerator[Loading | R, None]:
        """Do what `generate`, `stream` and `ask` promise; `generation` is the message where it is one."""
        model = target.route.name
        lost: set[ReplicaKey] = set()
        full: set[ReplicaKey] = set()
        batch = generation is not None and generation.batch
        with (
            self._meter.request(_operation_of(message), target.name) as seen,
            self._charged(seen, message),
            self._room.enter(model, message.ByteSize(), self._places(model, batch=batch)) as place,
        ):
            for number in range(1, MAX_TRIES + 1):
                replica = self._pick(model, lost | full, generation)
                if replica is None:
                    for key in lost:
                        await self._table.gone(key, self._gone_timeout_s)
                    async with aclosing(self._ensure(model, request_id, batch=batch)) as steps:
                        async for step in steps:
                            if isinstance(step, Loading):
                                yield step
                            else:
                                replica = step
                if replica is None:
                    raise ModelLoadFailed(f"The model '{target.name}' could not be brought up.")
                begun = False
                try:
                    async with aclosing(attempt(replica)) as events:
                        async for event in events:
                            if not begun and (generation is None or event.WhichOneof("event") != "progress"):
                                begun = True
                                place.begin()
                            seen.take(event)
                            yield event
                    return
                except HostlerError as error:
                    if isinstance(error, Overloaded):
                        error.retry_after_s = self._room.retry_after_s(model) or error.retry_after_s
                        full.add(key_of(replica))
                    else:
                        lost.add(key_of(replica))
                    if begun or number == MAX_TRIES or not self._worth_retrying(error, model, lost | full):
                        raise
                    log.warning(
                        "retrying elsewhere",
                        extra={"request_id": request_id, "reason": error.reason, "attempt": number},
                    )

    async def ask(self, target: Target, method: Method[Q, R], message: Q, request_id: str) -> R:
        """Return a worker's one answer. Cancelling the wait cancels the call. Otherwise as `stream`.

        Args:
            method: the stub's method to call with `message`.
        """

        async def once(replica: placement_pb2.Replica) -> AsyncGenerator[R, None]:
            metadata = call_metadata(request_id=request_id, generation=replica.generation)
            try:
                with self._channels.lease(replica) as worker:
                    answer = await method(worker.stub)(message, metadata=metadata)
            except grpc.RpcError as error:
                raise _worker_error(error) from None
            yield answer

        answers: list[R] = []
        async with aclosing(self._carry(target, once, message, request_id)) as events:
            async for event in events:
                if not isinstance(event, Loading):
                    answers.append(event)
        return answers[0]

    @contextmanager
    def _charged(self, seen: Seen, message: Message) -> Iterator[None]:
        """Charge the caller's key with the tokens that were used, however the request ends."""
        try:
            yield
        finally:
            caller = current_caller()
            if self._limits is not None and caller is not None and caller.key is not None:
                self._limits.charge(caller.key, seen.num_tokens(message.ByteSize))

    def _places(self, model: str, *, batch: bool) -> int:
        max_waiting = self._max_waiting(model)
        # The last quarter of the places is kept for those whom people wait for.
        return max(1, max_waiting * 3 // 4) if batch else max_waiting

    def _pick(
        self, model: str, avoided: set[ReplicaKey], request: pb.GenerateRequest | None = None
    ) -> placement_pb2.Replica | None:
        target = self._table.routes.find(model) if self._table.routes else None
        if target is None:
            return None
        replicas = {key_of(r): r for r in ready_replicas(target.route) if key_of(r) not in avoided}
        if len(replicas) < 2:
            return next(iter(replicas.values()), None)
        loads = [Load(key, self._channels.num_in_flight(r), r.max_running) for key, r in replicas.items()]
        hashes = [] if request is None else prefix_hashes(model, request)
        # Without a prefix to tell, equals take turns at random.
        prefix = hashes[-1] if hashes else os.urandom(8)
        key = choose(loads, remembered=self._affinity.recall(hashes, replicas), prefix=prefix)
        self._affinity.remember(hashes, key)
        return replicas[key]

    async def _ensure(
        self, model: str, request_id: str, *, batch: bool = False
    ) -> AsyncGenerator[Loading | placement_pb2.Replica, None]:
        steps = self._placement.ensure(model, request_id=request_id, timeout_s=self._ensure_timeout_s, batch=batch)
        self._room.loading(model)
        async with aclosing(steps):
            async for step in steps:
                if isinstance(step, placement_pb2.EnsureProgress):
                    self._room.loading(model, step.eta_ms)
                    yield Loading(step)
                else:
                    self._room.ready(model)
                    yield step

    def _worth_retrying(self, error: HostlerError, model: str, avoided: set[ReplicaKey]) -> bool:
        if isinstance(error, Overloaded):
            return self._pick(model, avoided) is not None
        # Plain `unavailable` is a worker that has just begun to drain.
        return type(error) in (WorkerLost, StaleGeneration, Unavailable)

    def _generated(self, request: pb.GenerateRequest, request_id: str) -> Attempt[pb.GenerateResponse]:
        async def attempt(replica: placement_pb2.Replica) -> AsyncGenerator[pb.GenerateResponse, None]:
            metadata = call_metadata(request_id=request_id, generation=replica.generation)
            with self._channels.lease(replica) as worker:
                try:
                    async with aclosing(worker.line.generate(request, metadata)) as events:
                        async for event in events:
                            yield event
                except grpc.RpcError as error:
                    raise _worker_error(error) from None

        return attempt

    def _streamed(self, method: StreamMethod[Q, R], message: Q, request_id: str) -> Attempt[R]:
        async def attempt(replica: placement_pb2.Replica) -> AsyncGenerator[R, None]:
            metadata = call_metadata(request_id=request_id, generation=replica.generation)
            with self._channels.lease(replica) as worker:
                call = method(worker.stub)(message, metadata=metadata)
                try:
                    async for event in call:
                        yield event
                        if event.HasField("finish"):
                            return
                except grpc.RpcError as error:
                    raise _worker_error(error) from None
                finally:
                    call.cancel()
            raise WorkerLost("The worker ended the reply before it was finished. Try again.")

        return attempt


def _operation_of(message: Message) -> str:
    """Return what the metrics call a request."""
    if isinstance(message, pb.GenerateRequest):
        return "chat" if message.HasField("chat") else "text_completion"
    return _OPERATIONS.get(type(message), "tokenize")


def _worker_error(error: grpc.RpcError) -> HostlerError:
    problem = from_rpc_error(error)
    if isinstance(problem, Cancelled):
        # Our own cancelling never arrives here, so the worker itself broke the call off.
        return WorkerLost("The worker broke the reply off. Try again.")
    return problem


async def merge(streams: list[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield the events of several streams as they come, each with its stream's index; the first failure ends all.

    One stream, the usual case, costs no task and no queue.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for event in stream:
                yield 0, event
        return
    # Bounded, so that a slow reader holds the workers back and not our memory.
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(index: int, stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    await queue.put((index, event))
        except Exception as error:
            await queue.put((index, error))
        else:
            await queue.put((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            index, item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
