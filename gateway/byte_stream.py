"""A reply of plain bytes that are sent as they are made. Above: routes; below: `lifetime`, `errors`.

As an event stream it ends in exactly one way. But bytes of audio have no place for an error, so a reply that fails
after its first byte ends by breaking the connection off: a chunked body without its end is an error to every client,
where one that merely stops would be a shorter recording.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import ClientGone, as_hostler_error
from gateway.lifetime import Lifetime
from gateway.sse import ABORT_EXTENSION

log = logging.getLogger(__name__)

_ABORTED_WITHIN_S = 1.0


class ByteStream(Response):
    """Sends chunks as they come; the status line waits for the first.

    Args:
        chunks: bytes, none of them empty. Closed in every case.
        media_type: of the whole.
        lifetime: ends the stream when the server must stop.
        stalled_reader_s: a reader that takes nothing for so long is dropped.
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
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._lifetime = lifetime
        self._request_id = request_id
        self._stalled_reader_s = stalled_reader_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream to its end.

        Raises:
            HostlerError: nothing has been sent yet, so the caller may still choose the status.
        """
        try:
            await self._lifetime.until_gone(receive, self._pump(scope, send))
        except ClientGone:
            return
        except Exception as exception:
            error = as_hostler_error(exception, request_id=self._request_id)
            if not self._started:
                raise error from exception
            log.warning("stream failed", extra={"request_id": self._request_id, "reason": error.reason})
            if not _abort(scope):
                raise
            # Whoever returns before the server knows that the connection is gone is blamed for an unfinished reply.
            with suppress(TimeoutError):
                async with asyncio.timeout(_ABORTED_WITHIN_S):
                    while (await receive())["type"] != "http.disconnect":
                        pass

    async def _pump(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await self._write(scope, send, chunk)
        await self._write(scope, send, b"", last=True)

    async def _write(self, scope: Scope, send: Send, chunk: bytes, *, last: bool = False) -> None:
        try:
            async with asyncio.timeout(self._stalled_reader_s):
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": chunk, "more_body": not last})
        except TimeoutError:
            log.warning("dropped a stalled reader", extra={"request_id": self._request_id})
            _abort(scope)
            raise ClientGone from None
        except OSError:
            raise ClientGone from None


def _abort(scope: Scope) -> bool:
    """Break the connection off; False where the server has no means to."""
    abort = scope.get("extensions", {}).get(ABORT_EXTENSION)
    if abort is not None:
        abort()
    return abort is not None
