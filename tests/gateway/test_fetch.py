"""Addresses from strangers: what is fetched, and all that must not be. No test opens a socket.

Connections end in `Wire`, at the seam where an address has been checked; numbers in any form go through the system's
own resolver.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable
from typing import Any

import httpcore2
import pytest

from gateway.addresses import is_public
from gateway.fetch import Fetcher, resolve
from gateway.linked_images import image_type
from gateway.links import Budget, FetchRefused

PUBLIC = "93.184.216.34"
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 20
IMAGES = Budget(max_bytes=1000, num_start_bytes=12, accept_start=lambda start: bool(image_type(start)))


def answer(body: bytes = PNG, status: int = 200, **headers: str) -> list[bytes]:
    named = {"content-length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value)
    return [f"HTTP/1.1 {status} x\r\n{lines}\r\n".encode(), body]


def redirect(to: str) -> list[bytes]:
    return answer(b"", 302, location=to)


class Stream(httpcore2.AsyncNetworkStream):
    """Plays a server's bytes; an iterator that never ends must not be read to its end."""

    def __init__(self, wire: Wire, data: Iterable[bytes]) -> None:
        self.wire = wire
        self.data = iter(data)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        await asyncio.sleep(0)
        self.wire.num_reads += 1
        if (chunk := next(self.data, b"")) == b"HANG":
            await asyncio.Event().wait()
        return chunk

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.wire.sent += buffer

    async def aclose(self) -> None:
        self.wire.num_closed += 1

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        self.wire.tls.append((server_hostname, ssl_context.check_hostname, ssl_context.verify_mode))
        return self

    def get_extra_info(self, info: str) -> Any:
        return None


class Wire(httpcore2.AsyncNetworkBackend):
    """Takes connections by address and plays one reply to each, in order, or the one that `by_address` has for it."""

    def __init__(
        self, *replies: Iterable[bytes] | Exception, by_address: dict[str, Iterable[bytes]] | None = None
    ) -> None:
        self.replies = list(replies)
        self.by_address = by_address or {}
        self.connected: list[tuple[str, int]] = []
        self.tls: list[tuple[str | None, bool, ssl.VerifyMode]] = []
        self.sent = b""
        self.num_reads = self.num_closed = 0

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore2.AsyncNetworkStream:
        self.connected.append((host, port))
        reply = self.by_address[host] if host in self.by_address else self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Stream(self, reply)


class Names:
    """A resolver that gives each name's answers in turn, the last one for ever."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): turns for name, turns in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        turns = self.answers[host]
        return turns.pop(0) if len(turns) > 1 else turns[0]


CAT = "http://cat.example/a.png"


def fetcher(wire: Wire, names: Callable[..., Any] | None = None, **options: Any) -> Fetcher:
    return Fetcher(names or Names(cat_example=[[PUBLIC]]), wire, **options)


async def refused(wire: Wire, url: str, names: Callable[..., Any] | None = None, **options: Any) -> str:
    with pytest.raises(FetchRefused) as caught:
        await fetcher(wire, names, **options).get(url, IMAGES)
    return str(caught.value)


HOSTILE_HOSTS = """
    127.0.0.1 127.1 127.8.9.10 2130706433 0x7f000001 0x7f.1 0177.0.0.1 017700000001 0 0.0.0.0 localhost
    10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 100.100.100.200 169.254.169.254 0xa9fea9fe 2852039166
    168.63.129.16 192.0.0.192 192.0.2.1 192.88.99.1 198.18.0.1 203.0.113.9 224.0.0.1 239.1.2.3 240.0.0.1 255.255.255.255
    [::] [::1] [::7f00:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:a00:1] [::ffff:169.254.169.254]
    [64:ff9b::7f00:1] [64:ff9b::10.0.0.1] [64:ff9b::a9fe:a9fe] [64:ff9b:1::a00:1]
    [2002:7f00:1::] [2002:a00:1::1] [2002:a9fe:a9fe::]
    [fe80::1] [fe80::1%25lo] [fc00::1] [fd00:ec2::254] [fec0::1] [ff02::1] [ff0e::1]
    [2001:0:4136:e378:8000:63bf:3fff:fdd2] [2001:db8::1] [100::1] [3fff::1] [5f00::1]
""".split()  # noqa: SIM905


@pytest.mark.parametrize("host", HOSTILE_HOSTS)
async def test_no_connection_is_opened_to_an_address_that_is_not_public_however_it_is_written(host: str) -> None:
    wire = Wire(answer())
    await refused(wire, f"http://{host}/", resolve)
    assert wire.connected == []


@pytest.mark.parametrize(
    "host", [PUBLIC, "0x5db8d822", "[2606:4700::1111]", "[::ffff:5db8:d822]", "[64:ff9b::5db8:d822]"]
)
async def test_a_public_address_is_fetched(host: str) -> None:
    wire = Wire(answer())
    assert await fetcher(wire, resolve).get(f"http://{host}/", IMAGES) == PNG
    assert all(is_public(address) for address, _ in wire.connected)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://cat.example/a.png",
        "gopher://cat.example/_x",
        "unix:///run/worker.sock",
        "//cat.example/a.png",
        "http:///a.png",
        "http://user:secret@cat.example/",
        "http://cat.example:22/",
        "http://cat.example:6379/",
        "http://cat.example:99999/",
        "http://[::1/",
        "http://cat.example\r\nHost: x/",
        "http://\ud800/",
        "",
    ],
)
async def test_addresses_that_are_not_plain_http_on_a_usual_port_are_refused_unresolved(url: str) -> None:
    wire, names = Wire(answer()), Names(cat_example=[[PUBLIC]])
    await refused(wire, url, names)
    assert (wire.connected, names.asked) == ([], [])


async def test_one_private_address_among_public_ones_refuses_the_name() -> None:
    wire = Wire(answer())
    await refused(wire, CAT, Names(cat_example=[[PUBLIC, "10.0.0.1"]]))
    assert wire.connected == []


async def test_a_name_that_changes_its_answer_is_connected_to_where_it_was_checked() -> None:
    wire, names = Wire(answer()), Names(cat_example=[[PUBLIC], ["127.0.0.1"]])
    await fetcher(wire, names).get(CAT, IMAGES)
    assert names.asked == ["cat.example"]
    assert wire.connected == [(PUBLIC, 80)]


async def test_an_unknown_and_a_private_name_are_answered_alike() -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    assert await refused(Wire(), CAT, unknown) == await refused(Wire(), CAT, Names(cat_example=[["10.0.0.1"]]))


async def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    wire = Wire(httpcore2.ConnectError(), answer())
    assert await fetcher(wire, Names(cat_example=[[PUBLIC, "1.1.1.1"]])).get(CAT, IMAGES) == PNG
    assert wire.connected == [(PUBLIC, 80), ("1.1.1.1", 80)]


async def test_the_name_stays_in_the_host_header_and_in_the_certificate_s_check() -> None:
    wire = Wire(answer())
    await fetcher(wire).get("https://cat.example/a%20b.png?x=1#f", IMAGES)
    assert wire.connected == [(PUBLIC, 443)]
    assert wire.tls == [("cat.example", True, ssl.CERT_REQUIRED)]
    head = wire.sent.decode().lower().split("\r\n")
    assert head[0] == "get /a%20b.png?x=1 http/1.1"
    assert "host: cat.example" in head
    assert "accept-encoding: identity" in head
    assert not [line for line in head if line.startswith(("cookie", "authorization", "proxy", "referer"))]


async def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    wire = Wire(answer())
    await fetcher(wire).get(CAT, IMAGES)
    assert wire.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.1/",
        "http://inside.example/",
        "//inside.example/",
        "https://[::ffff:10.0.0.1]/",
        "file:///etc/passwd",
        "http://cat.example:22/",
        "http://user@cat.example/",
        "",
    ],
)
async def test_a_redirect_passes_the_same_checks(to: str) -> None:
    wire = Wire(redirect(to), *[redirect(to)] * 3, answer())

    async def names(host: str, port: int) -> list[str]:
        known = {"cat.example": [PUBLIC], "inside.example": ["192.168.0.7"]}
        return known.get(host) or await resolve(host, port)

    await refused(wire, CAT, names)
    assert {address for address, _ in wire.connected} == {PUBLIC}


async def test_three_redirects_are_followed_each_resolved_anew_and_a_fourth_is_not() -> None:
    names = Names(a_example=[[PUBLIC]], b_example=[["1.1.1.1"]])
    hops = [redirect("http://b.example/1"), redirect("/2"), redirect("https://a.example/3")]
    wire = Wire(*hops, answer())
    assert await fetcher(wire, names).get("http://a.example/", IMAGES) == PNG
    assert wire.connected == [(PUBLIC, 80), ("1.1.1.1", 80), ("1.1.1.1", 80), (PUBLIC, 443)]
    assert names.asked == ["a.example", "b.example", "b.example", "a.example"]
    assert wire.num_closed >= 4
    too_many = Wire(*hops, redirect("http://b.example/4"), answer())
    assert "more than 3" in await refused(too_many, "http://a.example/", names)
    assert len(too_many.connected) == 4


def endless(start: bytes) -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\n\r\n" + start
    while True:
        yield b"x" * 100


async def test_a_body_over_the_cap_is_given_up_when_declared_or_when_reached() -> None:
    declared = Wire(answer(PNG, content_length="1001"))
    assert "1000 bytes" in await refused(declared, CAT)
    assert declared.num_reads == 1
    flood = Wire(endless(PNG))
    assert "1000 bytes" in await refused(flood, CAT)
    assert flood.num_reads < 20


async def test_what_is_not_an_image_is_given_up_at_its_first_bytes() -> None:
    flood = Wire(endless(b"<html>secrets</html>"))
    assert "not an image" in await refused(flood, CAT)
    assert flood.num_reads == 1
    assert "not an image" in await refused(Wire(answer(b"\x89PNG")), CAT)
    assert "not an image" in await refused(Wire(answer(b"")), CAT)


async def test_a_compressed_body_is_refused() -> None:
    assert "compressed" in await refused(Wire(answer(content_encoding="gzip")), CAT)


@pytest.mark.parametrize("status", [204, 206, 300, 304, 401, 404, 500])
async def test_only_a_plain_success_counts(status: int) -> None:
    assert str(status) in await refused(Wire(answer(status=status, content_length="")), CAT)


@pytest.mark.parametrize("when", ["names", "head", "body"])
async def test_one_deadline_covers_look_up_head_and_body(when: str) -> None:
    async def slow(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        raise AssertionError

    head = b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n"
    replies = {"names": [], "head": [b"HANG"], "body": [head + PNG, b"HANG"]}
    wire = Wire(replies[when])
    names = slow if when == "names" else None
    async with asyncio.timeout(2):
        assert "within 0.05 s" in await refused(wire, CAT, names, deadline_s=0.05)
    assert wire.num_closed >= len(wire.connected)


async def test_garbage_and_a_server_that_hangs_up_are_refusals() -> None:
    for reply in ([b"SSH-2.0-OpenSSH\r\n"], [b""], [b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n" + PNG, b""]):
        assert "cannot be reached" in await refused(Wire(reply), CAT)
    assert "cannot be reached" in await refused(Wire(*[httpcore2.ConnectError()] * 3), CAT)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n....", "image/png"),
        (b"\xff\xd8\xff\xe0........", "image/jpeg"),
        (b"GIF89a......", "image/gif"),
        (b"RIFF....WEBP", "image/webp"),
        (b"RIFF....WAVE", ""),
        (b"<svg xmlns='", ""),
        (b"", ""),
    ],
)
def test_an_image_is_known_by_its_first_bytes(start: bytes, kind: str) -> None:
    assert image_type(start) == kind
