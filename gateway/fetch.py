"""Fetches what a stranger's URL points at, without becoming the stranger's hand inside our network (SSRF).

Above: `linked_images`. Below: httpcore2, the resolver. What holds, each by a test in `tests/gateway/test_fetch.py`:
http and https only, on their usual ports; every address that a name resolves to must be public; the connection goes
to the very address that was checked, with no second look-up; each redirect, of at most three, passes the same checks;
no proxy, cookie or key of ours goes along; one deadline and one cap of bytes cover everything.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable

import httpcore2
import httpx

from gateway.addresses import is_public
from gateway.links import Budget, FetchRefused

MAX_REDIRECTS = 3
DEADLINE_S = 10.0
PORTS = {80, 443, 8080, 8443}
_MAX_TRIED_ADDRESSES = 3
_REDIRECTS = {301, 302, 303, 307, 308}
_HEADERS = (("User-Agent", "hostler"), ("Accept", "image/*"), ("Accept-Encoding", "identity"))

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) → its addresses in plain textual form. Raises OSError."""


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, or of a number in any of the forms that the system's resolver reads."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


async def public_addresses(resolve: Resolve, host: str, port: int) -> list[str]:
    """Return the addresses of a name that may be connected to, a few at most.

    Raises:
        FetchRefused: it has none, or not only public ones.
    """
    try:
        addresses = list(dict.fromkeys(await resolve(host, port)))
    except (OSError, UnicodeError):
        addresses = []
    if not addresses or not all(is_public(address) for address in addresses):
        # One sentence for both, lest it tell strangers which names our own network knows.
        raise FetchRefused("its host is not known as a public one")
    return addresses[:_MAX_TRIED_ADDRESSES]


class PublicBackend(httpcore2.AsyncNetworkBackend):
    """Connects a name to a public address that was checked, resolved once for each connection.

    httpcore2 asks for a connection by name and keeps that name for the Host header, SNI and the certificate's check.

    Args:
        resolve: the one look-up.
        connect: opens the connection, by address; None: TCP.
    """

    def __init__(self, resolve: Resolve, connect: httpcore2.AsyncNetworkBackend | None = None) -> None:
        self._resolve = resolve
        self._connect = connect or httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Open a connection to a public address of `host`.

        Raises:
            FetchRefused: it has none, or not only such.
            httpcore2.ConnectError: none of them answers.
        """
        failure: Exception | None = None
        for address in await public_addresses(self._resolve, host, port):
            try:
                return await self._connect.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise httpcore2.ConnectError from failure

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        """Refuse: no URL leads here."""
        raise FetchRefused("it is not an http address")

    async def sleep(self, seconds: float) -> None:
        """Wait between tries, as httpcore2 asks."""
        await asyncio.sleep(seconds)


class Fetcher:
    """Fetches URLs under the rules of this module. Keeps no connection between fetches.

    Args:
        resolve: the look-up of names.
        connect: opens connections by address; None: TCP.
        ssl_context: for https; None: certificates that are commonly trusted.
        deadline_s: for one fetch, with its look-ups and redirects.
    """

    def __init__(
        self,
        resolve: Resolve = resolve,
        connect: httpcore2.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._backend = PublicBackend(resolve, connect)
        self._ssl_context = ssl_context
        self._deadline_s = deadline_s

    async def get(self, url: str, budget: Budget) -> bytes:
        """Return the body.

        Raises:
            FetchRefused: with the reason.
        """
        if self._ssl_context is None:
            self._ssl_context = await asyncio.to_thread(httpx.create_ssl_context, trust_env=False)
        try:
            async with (
                asyncio.timeout(self._deadline_s),
                httpcore2.AsyncConnectionPool(
                    ssl_context=self._ssl_context, network_backend=self._backend, max_keepalive_connections=0
                ) as pool,
            ):
                return await self._follow(pool, url, budget)
        except TimeoutError:
            raise FetchRefused(f"it did not arrive within {self._deadline_s:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError):
            raise FetchRefused("its server cannot be reached, or does not speak HTTP") from None

    async def _follow(self, pool: httpcore2.AsyncConnectionPool, url: str, budget: Budget) -> bytes:
        target = checked_url(url, None)
        for _ in range(MAX_REDIRECTS + 1):
            async with pool.stream("GET", _core_url(target), headers=[*_HEADERS, ("Host", _host(target))]) as response:
                if response.status not in _REDIRECTS:
                    return await _body(response, budget)
                target = checked_url(_header(response, b"location"), target)
        raise FetchRefused(f"it redirects more than {MAX_REDIRECTS} times")


def checked_url(text: str, base: httpx.URL | None) -> httpx.URL:
    """Return a URL that we would fetch, relative to where the redirect came from.

    Raises:
        FetchRefused: its scheme, port or form is not one of ours.
    """
    try:
        url = httpx.URL(text) if base is None else base.join(text)
        port = url.port
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise FetchRefused("it is not a valid address") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise FetchRefused("it is not an http or https address")
    if url.userinfo:
        raise FetchRefused("it holds a user name or password")
    if port is not None and port not in PORTS:
        raise FetchRefused(f"its port is none of {', '.join(map(str, sorted(PORTS)))}")
    return url


def _core_url(url: httpx.URL) -> httpcore2.URL:
    return httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _host(url: httpx.URL) -> bytes:
    return url.netloc


def _header(response: httpcore2.Response, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), "")


async def _body(response: httpcore2.Response, budget: Budget) -> bytes:
    if response.status != 200:
        raise FetchRefused(f"its server answers {response.status}")
    if _header(response, b"content-encoding").lower() not in ("", "identity"):
        raise FetchRefused("its server sends it compressed, though asked not to")
    too_large = FetchRefused(f"it is larger than the {budget.max_bytes} bytes that are left for this request")
    declared = _header(response, b"content-length")
    if declared.isascii() and declared.isdigit() and int(declared[:18]) > budget.max_bytes:
        raise too_large
    body, looked = bytearray(), False
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > budget.max_bytes:
            raise too_large
        if not looked and len(body) >= budget.num_start_bytes:
            looked = True
            _look(body, budget)
    if not looked:
        _look(body, budget)
    return bytes(body)


def _look(body: bytearray, budget: Budget) -> None:
    if not budget.accept_start(bytes(body[: budget.num_start_bytes])):
        raise FetchRefused("it is not an image")
