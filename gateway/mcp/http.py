"""MCP over HTTP, streamable or by server-sent events. Above: `connection`; below: the `mcp` package, httpx2.

The package does the protocol. Ours is the way out: no redirect is followed, no proxy or cookie of ours goes along,
what comes in is counted, and for addresses that a request gave, only public ones are connected to (`gateway.fetch`).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpcore2
import httpx
import httpx2
from mcp.client._transport import TransportStreams
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client

from gateway.links import FetchRefused
from gateway.mcp.remote import McpFault
from gateway.mcp.wire import ByteMeter

CONNECT_S = 10.0
# Between two events of a stream; each call has its own, shorter deadline.
_SILENCE_S = 3600.0
UNREACHABLE = "The MCP server cannot be reached."


class GuardedTransport(httpx2.AsyncBaseTransport):
    """Sends requests out under this module's rules.

    Args:
        meter: counts what comes in, and hears why the way out failed.
        backend: opens connections; None: to anywhere.
    """

    def __init__(
        self, meter: ByteMeter, ssl_context: ssl.SSLContext, backend: httpcore2.AsyncNetworkBackend | None
    ) -> None:
        self._meter = meter
        self._pool = httpcore2.AsyncConnectionPool(ssl_context=ssl_context, network_backend=backend)
        self.refusal = 0
        """HTTP status of the latest message that was refused."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request.

        Raises:
            httpx2.TransportError: it could not be sent, or was redirected; the meter knows why.
        """
        assert isinstance(request.stream, httpx2.AsyncByteStream)
        url = request.url
        core = httpcore2.Request(
            method=request.method,
            url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        try:
            response = await self._pool.handle_async_request(core)
        except FetchRefused as refused:
            raise self._fail(McpFault(f"The MCP server's address is refused: {refused}.")) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError):
            raise self._fail(McpFault(UNREACHABLE)) from None
        if request.method == "POST" or response.status >= 400:
            self.refusal = response.status if response.status >= 400 else 0
        if dict(response.headers).get(b"content-encoding", b"identity").lower() != b"identity":
            await response.aclose()
            raise self._fail(McpFault("The MCP server sends compressed data, though asked not to."))
        if 300 <= response.status < 400:
            await response.aclose()
            raise self._fail(
                McpFault(
                    f"The MCP server redirects (HTTP {response.status}), and redirects are not followed. "
                    "Give the address that it redirects to, if you trust that.",
                    kind="http",
                    code=response.status,
                )
            )
        assert isinstance(response.stream, AsyncIterable)
        return httpx2.Response(
            response.status,
            headers=response.headers,
            stream=_Counted(response.stream, self._meter),
            extensions=response.extensions,
        )

    def _fail(self, fault: McpFault) -> httpx2.TransportError:
        self._meter.fail(fault)
        return httpx2.ConnectError(fault.message)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


class _Counted(httpx2.AsyncByteStream):
    def __init__(self, stream: AsyncIterable[bytes], meter: ByteMeter) -> None:
        self._stream = stream
        self._meter = meter

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._stream:
                self._meter.take(len(chunk))
                yield chunk
        except McpFault as fault:
            raise httpx2.ReadError(fault.message) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
            raise httpx2.ReadError("the connection broke") from error

    async def aclose(self) -> None:
        close = getattr(self._stream, "aclose", None)
        if close is not None:
            await close()


@asynccontextmanager
async def open_http(
    url: str,
    headers: Mapping[str, str],
    transport: str,
    meter: ByteMeter,
    backend: httpcore2.AsyncNetworkBackend | None,
) -> AsyncIterator[tuple[TransportStreams, GuardedTransport]]:
    """Yield the streams of a server at an address, and what knows how the way there is.

    Args:
        transport: "http" or "sse".
        backend: as `GuardedTransport`'s.
    """
    ssl_context = await asyncio.to_thread(httpx.create_ssl_context, trust_env=False)
    guarded = GuardedTransport(meter, ssl_context, backend)

    def client(
        headers: dict[str, str] | None = None,
        timeout: httpx2.Timeout | None = None,
        auth: httpx2.Auth | None = None,
    ) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            transport=guarded,
            # Compressed, a little on the wire would be a lot in memory.
            headers={"User-Agent": "hostler", "Accept-Encoding": "identity", **(headers or {})},
            timeout=httpx2.Timeout(CONNECT_S, read=_SILENCE_S),
            trust_env=False,
        )

    if transport == "sse":
        async with sse_client(url, dict(headers), httpx_client_factory=client) as streams:
            yield streams, guarded
        return
    async with (
        client(dict(headers)) as http_client,
        streamable_http_client(url, http_client=http_client, max_sse_event_size=meter.max_bytes) as streams,
    ):
        yield streams, guarded
