"""A reply that is sent as it is made, and ends in exactly one way. Above: `sse`, `byte_stream`; below: `lifetime`.

The status line waits for the first bytes, so what fails before them is an ordinary error.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod

from hostler.errors import HostlerError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import ClientGone, as_hostler_error
from gateway.lifetime import Lifetime

log = logging.getLogger(__name__)

ABORT_EXTENSION = "hostler.abort"
"""In a request's scope: what breaks its connection off at once."""

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class StreamedReply(Response):
    """What all such replies share; their kinds say what is sent, and what a failure after the first byte looks like.

    Args:
        media_type: of the whole.
        lifetime: ends the reply when the client has left or the server must stop.
        is_spectator: it only watches, so it ends as soon as the server begins to stop.
        stalled_reader_s: a reader that takes nothing for so long is dropped.
    """

    def __init__(
        self,
        media_type: str,
        lifetime: Lifetime,
        *,
        request_id: str,
        stalled_reader_s: float,
        is_spectator: bool = False,
    ) -> None:
        super().__init__(media_type=media_type, headers=_HEADERS)
        del self.headers["content-length"]
        self._lifetime = lifetime
        self._request_id = request_id
        self._stalled_reader_s = stalled_reader_s
        self._is_spectator = is_spectator
        self._started = False

    @abstractmethod
    async def _pump(self, scope: Scope, send: Send) -> None:
        """Send everything."""

    @abstractmethod
    async def _fail(self, error: HostlerError, scope: Scope, receive: Receive, send: Send) -> None:
        """End a reply that has begun and failed; called while the failure is handled."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the reply to its end.

        Raises:
            HostlerError: nothing has been sent yet, so the caller may still choose the status.
        """
        try:
            await self._lifetime.until_gone(receive, self._pump(scope, send), is_spectator=self._is_spectator)
        except ClientGone:
            return
        except Exception as exception:
            error = as_hostler_error(exception, request_id=self._request_id)
            if not self._started:
                raise error from exception
            log.warning("stream failed", extra={"request_id": self._request_id, "reason": error.reason})
            await self._fail(error, scope, receive, send)

    async def _write(self, scope: Scope, send: Send, data: bytes, *, last: bool = False) -> None:
        """Send some of the body.

        Raises:
            ClientGone: it left, or takes nothing any more and was dropped.
        """
        try:
            async with asyncio.timeout(self._stalled_reader_s):
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": data, "more_body": not last})
        except TimeoutError:
            log.warning("dropped a stalled reader", extra={"request_id": self._request_id})
            abort(scope)
            raise ClientGone from None
        except OSError:
            raise ClientGone from None


def abort(scope: Scope) -> bool:
    """Break the connection off; False where the server has no means to."""
    breaks_off = scope.get("extensions", {}).get(ABORT_EXTENSION)
    if breaks_off is not None:
        breaks_off()
    return breaks_off is not None
