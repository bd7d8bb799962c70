"""Server-sent events: frames, and the reply that carries them. Above: routes; below: `streamed_reply`.

A stream ends in exactly one way: its frames to the end; or an error frame and then nothing; or the client has left.
Before the first byte an error is still an ordinary HTTP reply, so nothing is sent before there is something to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

import orjson
from hostler.errors import HostlerError
from starlette.types import Receive, Scope, Send

from gateway.errors import error_body
from gateway.lifetime import Lifetime
from gateway.streamed_reply import StreamedReply

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
PING_S = 5.0
# How long a comment waits before it may open the reply and with that give up the HTTP status.
FIRST_COMMENT_S = 0.25
# A load may report its progress many times a second; people read the latest.
COMMENT_GAP_S = 0.5
STALLED_READER_S = 60.0


# JSON may hold these as they are, but clients that cut lines as Python's str.splitlines does (httpx among
# them) would cut there.
_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))


def one_line_json(value: object) -> bytes:
    """Return JSON that every client takes for one line."""
    text = orjson.dumps(value)
    if not text.isascii():
        for raw, escaped in _LINE_ENDS:
            text = text.replace(raw, escaped)
    return text


def data_frame(value: dict[str, Any]) -> bytes:
    """Return `data: <JSON>` as one whole event."""
    return b"data: " + one_line_json(value) + b"\n\n"


def event_frame(value: dict[str, Any]) -> bytes:
    """Return an event that is named by its own `type`, in both of the lines that clients look for it in."""
    kind: str = value["type"]
    return b"event: " + kind.encode() + b"\ndata: " + one_line_json(value) + b"\n\n"


def error_frame(error: HostlerError) -> bytes:
    """Return OpenAI's error as an event."""
    return data_frame(error_body(error))


def comment_frame(text: str) -> bytes:
    """Return a comment: every client skips it, proxies see life."""
    return b": " + " ".join(text.split()).encode("utf-8", errors="replace") + b"\n\n"


class EventStream(StreamedReply):
    """Sends frames as they come, comments in silence, and an error frame when the frames end in one.

    Args:
        frames: whole frames; those that begin with a colon are comments. Closed in every case.
        lifetime, is_spectator, stalled_reader_s: as `StreamedReply` has them.
        ping_s: longest silence.
        first_ping_s: the same before the first byte.
        first_comment_s: grace before a comment may be the first byte.
        comment_gap_s: shortest time from a frame to a comment; of those in between the last is sent.
        error_frames: what a stream that has begun says of its failure, in its dialect.
        ping: what breaks a silence.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        lifetime: Lifetime,
        *,
        request_id: str = "",
        is_spectator: bool = False,
        ping_s: float = PING_S,
        first_ping_s: float = PING_S,
        first_comment_s: float = FIRST_COMMENT_S,
        comment_gap_s: float = COMMENT_GAP_S,
        stalled_reader_s: float = STALLED_READER_S,
        error_frames: Callable[[HostlerError], bytes] = error_frame,
        ping: Callable[[], bytes] = lambda: PING,
    ) -> None:
        super().__init__(
            "text/event-stream",
            lifetime,
            request_id=request_id,
            stalled_reader_s=stalled_reader_s,
            is_spectator=is_spectator,
        )
        self._frames = frames
        self._ping_s = ping_s
        self._first_ping_s = first_ping_s
        self._first_comment_s = first_comment_s
        self._comment_gap_s = comment_gap_s
        self.error_frames = error_frames
        self._ping = ping

    async def _pump(self, scope: Scope, send: Send) -> None:
        loop = asyncio.get_running_loop()
        born = last_sent = loop.time()
        held_back = b""
        holding = asyncio.Event()
        writing = asyncio.Lock()

        async def write(frame: bytes) -> None:
            nonlocal last_sent, held_back
            # Whatever is sent now is newer than a comment that waits.
            held_back = b""
            holding.clear()
            async with writing:
                await self._write(scope, send, frame)
            last_sent = loop.time()

        def comment_in_s() -> float:
            due = last_sent + self._comment_gap_s if self._started else born + self._first_comment_s
            return due - loop.time()

        def ping_in_s() -> float:
            return last_sent + (self._ping_s if self._started else self._first_ping_s) - loop.time()

        async def keep_alive() -> None:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(ping_in_s()):
                        await holding.wait()
                if held_back and (left_s := comment_in_s()) > 0:
                    await asyncio.sleep(left_s)
                elif held_back:
                    await write(held_back)
                elif ping_in_s() <= 0:
                    await write(self._ping())

        pinger = asyncio.create_task(keep_alive())
        pinger.add_done_callback(_retrieve)
        try:
            async with aclosing(self._frames) as frames:
                async for frame in frames:
                    if frame.startswith(b":") and comment_in_s() > 0:
                        held_back = frame
                        holding.set()
                    else:
                        await write(frame)
        finally:
            pinger.cancel()
        async with writing:
            await self._write(scope, send, b"", last=True)

    async def _fail(self, error: HostlerError, scope: Scope, receive: Receive, send: Send) -> None:
        await self._write(scope, send, self.error_frames(error), last=True)


def _retrieve(task: asyncio.Task[None]) -> None:
    # Its only failure is a client that left, and the stream's own task learns of that by itself.
    if not task.cancelled():
        task.exception()
