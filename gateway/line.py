"""Many generations at one worker, whose events come together. Above: `channels`, `dispatch`; below: the inference stub.

Each generation is a gRPC call of its own, with its own cancellation and status. But reading a message costs far more
than what is in it, and a step makes one for every call; so the events of all calls come over one stream (the contract's
`Follow`), which is opened by the first call and anew after it broke.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, TypeAlias

import grpc.aio
from hostler.errors import WorkerLost
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import line_pb2

if TYPE_CHECKING:
    from hostler.inference.v1.inference_pb2_grpc import InferenceServiceAsyncStub

# A call's status may overtake its last events, which travel beside it.
_LATE_WITHIN_S = 1.0

# None: the call or the line has ended.
_Queue: TypeAlias = "asyncio.Queue[pb.LineEvent | None]"


class _Follower:
    """Reads one `Follow` and hands out its events."""

    def __init__(self, stub: InferenceServiceAsyncStub) -> None:
        self.name = secrets.token_hex(16)
        self.queues: dict[int, _Queue] = {}
        self.has_ended = False
        self.error: grpc.RpcError | None = None
        self._stub = stub
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for message in self._stub.Follow(line_pb2.FollowRequest(line=self.name)):
                for item in message.events:
                    queue = self.queues.get(item.call)
                    if queue is not None:  # else its client has left
                        queue.put_nowait(item)
        except grpc.RpcError as error:
            self.error = error
        finally:
            self.has_ended = True
            for queue in self.queues.values():
                queue.put_nowait(None)

    async def events(self, queue: _Queue) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Yield a call's events until the worker says that there are no more, the line has ended, or the call has."""
        patience_s = None
        while True:
            try:
                item = await asyncio.wait_for(queue.get(), patience_s)
            except TimeoutError:
                return
            if item is not None and item.HasField("event"):
                yield item.event
            elif item is not None or self.has_ended:
                return
            else:
                patience_s = _LATE_WITHIN_S


class Line:
    """The generations at one worker.

    Args:
        stub: the worker's.
    """

    def __init__(self, stub: InferenceServiceAsyncStub) -> None:
        self._stub = stub
        self._numbers = itertools.count(1)
        self._follower: _Follower | None = None

    async def generate(
        self, request: pb.GenerateRequest, metadata: tuple[tuple[str, str], ...]
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Stream one generation to its `finish`. Closing the generator cancels the call at once.

        Raises:
            grpc.RpcError: the call failed, or the line did.
            WorkerLost: the call ended without a finish.
        """
        if self._follower is None or self._follower.has_ended:
            self._follower = _Follower(self._stub)
        follower, number = self._follower, next(self._numbers)
        queue: _Queue = asyncio.Queue()
        follower.queues[number] = queue
        request.line.name, request.line.call = follower.name, number
        call = self._stub.Generate(request, metadata=metadata)
        call.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            async for event in follower.events(queue):
                yield event
                if event.HasField("finish"):
                    return
            if follower.error is not None and not call.done():
                raise follower.error
            async for _ in call:  # raises what the call failed with
                pass
        finally:
            del follower.queues[number]
            call.cancel()
        raise WorkerLost("The worker ended the reply before it was finished. Try again.")
