"""A reply of plain bytes that are sent as they are made. Above: routes; below: `streamed_reply`.

As an event stream it ends in exactly one way. But bytes of audio have no place for an error, so a reply that fails
after its first byte ends by breaking the connection off: a chunked body without its end is an error to every client,
where one that merely stops would be a shorter recording.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from hostler.errors import HostlerError
from starlette.types import Receive, Scope, Send

from gateway.lifetime import Lifetime
from gateway.streamed_reply import StreamedReply, abort

_ABORTED_WITHIN_S = 1.0


class ByteStream(StreamedReply):
    """Sends chunks as they come; the status line waits for the first.

    Args:
        chunks: bytes, none of them empty. Closed in every case.
        media_type, lifetime, stalled_reader_s: as `StreamedReply` has them.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        media_type: str,
        lifetime: Lifetime,
        *,
        request_id: str,
        stalled_reader_s: float,
    ) -> None:
        super().__init__(media_type, lifetime, request_id=request_id, stalled_reader_s=stalled_reader_s)
        self._chunks = chunks

    async def _pump(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await self._write(scope, send, chunk)
        await self._write(scope, send, b"", last=True)

    async def _fail(self, error: HostlerError, scope: Scope, receive: Receive, send: Send) -> None:
        if not abort(scope):
            raise error
        # Whoever returns before the server knows that the connection is gone is blamed for an unfinished reply.
        with suppress(TimeoutError):
            async with asyncio.timeout(_ABORTED_WITHIN_S):
                while (await receive())["type"] != "http.disconnect":
                    pass
