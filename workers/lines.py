"""Lines: the events of many calls on their way to one client, a step's in one message. Above: the inference servicer.

A message costs both ends far more than what is in it, so a client that has many calls at one worker (a gateway)
follows one line and names it in each of them. What a step makes for all of them then leaves as one message; where the
client is slow, several steps do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from hostler.errors import InvalidRequest, Unavailable
from hostler.inference.v1 import inference_pb2 as pb

_MAX_EVENTS = 1024  # in a message; when so many wait for a slow client, the calls do, too
# Whoever names a line opens it at the same time.
_FOLLOWED_WITHIN_S = 5.0


class _Line:
    def __init__(self) -> None:
        self.num_users = 0
        self.followed = asyncio.Event()
        self.waiting: list[pb.LineEvent] = []
        self.ready = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()

    async def until_followed(self) -> None:
        try:
            async with asyncio.timeout(_FOLLOWED_WITHIN_S):
                await self.followed.wait()
        except TimeoutError:
            raise Unavailable("Whoever asked does not follow its line. Try again.") from None

    def put(self, event: pb.LineEvent) -> None:
        self.waiting.append(event)
        self.ready.set()
        if len(self.waiting) >= _MAX_EVENTS:
            self.room.clear()

    def take(self) -> list[pb.LineEvent]:
        """Return what fits into one message."""
        end = min(len(self.waiting), _MAX_EVENTS)
        for index, item in enumerate(self.waiting[:end]):
            if item.event.HasField("prompt_logprobs"):  # may be as large as a message can be
                end = max(1, index)
                break
        taken, self.waiting = self.waiting[:end], self.waiting[end:]
        if len(self.waiting) < _MAX_EVENTS:
            self.room.set()
        return taken


class Lines:
    """All lines of a worker. A line is there as long as somebody follows it or a call names it."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._has_ended = False

    async def carry(
        self, request: pb.GenerateRequest, generated: AsyncGenerator[pb.GenerateResponse, None]
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Yield what goes over the call itself: all that is generated, or nothing where the request names a line.

        Raises:
            Unavailable: nobody follows that line.
        """
        async with aclosing(generated) as events:
            if not request.HasField("line"):
                async for event in events:
                    yield event
                return
            call = request.line.call
            with self._used(request.line.name) as line:
                await line.until_followed()
                try:
                    async for event in events:
                        line.put(pb.LineEvent(call=call, event=event))
                        await line.room.wait()
                finally:
                    line.put(pb.LineEvent(call=call))

    async def follow(self, name: str) -> AsyncGenerator[pb.FollowResponse, None]:
        """Yield what is put on a line, until `end`.

        Raises:
            InvalidRequest: it has no name, or somebody follows it.
        """
        with self._used(name) as line:
            if not name or line.followed.is_set():
                raise InvalidRequest("A line wants a name that nobody else has.", param="line")
            line.followed.set()
            while not self._has_ended:
                await line.ready.wait()
                line.ready.clear()
                while line.waiting:
                    yield pb.FollowResponse(events=line.take())

    def end(self) -> None:
        """Let all who follow a line go."""
        self._has_ended = True
        for line in self._lines.values():
            line.ready.set()

    @contextmanager
    def _used(self, name: str) -> Iterator[_Line]:
        line = self._lines.setdefault(name, _Line())
        line.num_users += 1
        try:
            yield line
        finally:
            line.num_users -= 1
            if not line.num_users:
                self._lines.pop(name, None)
