"""Strangers at a server that demands no key: other sites' pages, confusing hosts, forged forwarding, names as paths.

Each test fails when the defence that it names is taken away; `tests/threats.yaml` says which that is.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.routing import Route

from gateway.auth import HostCheck, PageCheck
from tests.gateway.fakes import MODEL, World, text, world

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
CHAT_PATH = "/v1/chat/completions"

OTHER_SITES = [
    "https://evil.example",
    "http://evil.example:8000",
    "http://127.0.0.1.evil.example",
    "http://localhost.evil.example",
    "http://localhost@evil.example",
    "http://evil.example#localhost",
    "http://evillocalhost",
    "http://127.0.0.1.nip.io",
    "http://192.168.1.20",
    "HTTPS://EVIL.EXAMPLE",
    "null",
    "",
    "localhost",
]
LOCAL_PROGRAMS = [
    "tauri://localhost",
    "http://tauri.localhost",
    "https://tauri.localhost:1420",
    "vscode-file://vscode-app",
    "vscode-webview://0a1b2c",
    "file://",
    "app://obsidian.md",
    "http://localhost:3000",
    "http://127.0.0.1:8000",
    "http://[::1]:5173",
]


@pytest.mark.parametrize("origin", OTHER_SITES)
async def test_another_sites_page_is_refused_without_a_key_whatever_it_sends(called: World, origin: str) -> None:
    for kind in ("text/plain", "application/json", "application/x-www-form-urlencoded", ""):
        headers = {"origin": origin, "content-type": kind}
        reply = await called.client.post(CHAT_PATH, json=CHAT, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "permission_denied"), kind
    assert (await called.client.get("/v1/models", headers={"origin": origin})).status_code == 403
    assert (await called.client.delete("/v1/responses/resp_1", headers={"origin": origin})).status_code == 403
    assert called.worker.requests == []


@pytest.mark.parametrize("origin", LOCAL_PROGRAMS)
async def test_a_program_of_this_machine_is_served_whatever_origin_it_names(called: World, origin: str) -> None:
    headers = {"origin": origin, "sec-fetch-site": "cross-site"}
    assert (await called.client.post(CHAT_PATH, json=CHAT, headers=headers)).status_code == 200


async def test_every_route_is_closed_to_other_sites_pages_without_a_key(called: World) -> None:
    paths = sorted({route.path for route in called.app.routes if isinstance(route, Route)})
    assert {"/chat/completions", "/audio/transcriptions", "/load_model"} <= set(paths)
    for path in paths:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
                reply = await called.client.request(method, path, content=b"{}", headers=headers)
                assert reply.status_code == 403, (method, path, headers)


async def test_what_a_page_loads_without_an_origin_is_refused_but_a_link_is_followed(called: World) -> None:
    image = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    frame = link | {"sec-fetch-dest": "iframe"}
    assert (await called.client.get("/v1/models", headers=image)).status_code == 403
    assert (await called.client.get("/v1/models", headers=frame)).status_code == 403
    assert (await called.client.get("/v1/models", headers=link)).status_code == 200
    assert (await called.client.post(CHAT_PATH, json=CHAT, headers=link)).status_code == 403
    for site in ("none", "same-origin", "same-site"):
        assert (await called.client.get("/v1/models", headers={"sec-fetch-site": site})).status_code == 200


async def test_two_origins_are_as_good_as_the_worse(called: World) -> None:
    headers = [("origin", "tauri://localhost"), ("origin", "https://evil.example")]
    assert (await called.client.post(CHAT_PATH, json=CHAT, headers=headers)).status_code == 403


async def test_cors_and_allowed_hosts_let_pages_in_and_a_key_needs_no_origin() -> None:
    origin, tunnel = "https://app.example", "https://tunnel.example"
    async with world(over_tcp=False, config={"cors": (origin, "null"), "allowed_hosts": ("tunnel.example",)}) as here:
        for allowed in (origin, "null", tunnel):
            reply = await here.client.post(CHAT_PATH, json=CHAT, headers={"origin": allowed})
            assert reply.status_code == 200, allowed
        assert (await here.client.get("/v1/models", headers={"origin": "https://evil.example"})).status_code == 403
    async with world(over_tcp=False, config={"api_key": "correct-horse"}) as here:
        headers = {"origin": "https://evil.example", "x-api-key": "correct-horse"}
        assert (await here.client.post(CHAT_PATH, json=CHAT, headers=headers)).status_code == 200
        del headers["x-api-key"]
        assert (await here.client.post(CHAT_PATH, json=CHAT, headers=headers)).status_code == 401


STRANGE_HOSTS = """
    evil.example 127.0.0.1.evil.example localhost.evil.example localhost@evil.example evil.example#localhost
    evil.example/localhost localhost:80@evil.example 127.0.0.1.nip.io 127.0.0.2 127.1 2130706433 0x7f000001 0.0.0.0
    [::] [::ffff:127.0.0.1] ::1 localhost:80:80 localhost:x localhost:+80 localhost%00.evil.example
    localhost,evil.example
    foo.localhost [::1].evil.example metadata.google.internal
""".split()  # noqa: SIM905


@pytest.mark.parametrize("host", [*STRANGE_HOSTS, "", ":80", "localhost evil.example", "lоcalhost", "localhost\x00"])
def test_only_the_exact_names_of_this_server_are_its_host(host: str) -> None:
    check = HostCheck("127.0.0.1", (), has_key=False)
    assert not check.allows([(b"host", host.encode())])
    assert check.allows([(b"host", b"localhost:8000")])


async def test_a_rebound_name_is_refused_with_and_without_a_port_on_every_route(called: World) -> None:
    for path in sorted({route.path for route in called.app.routes if isinstance(route, Route)}):
        for host in ("rebound.example", "rebound.example:8000"):
            reply = await called.client.post(path, content=b"{}", headers={"host": host})
            assert reply.status_code == 403, (path, host)


async def test_hosts_that_contradict_each_other_on_the_wire_are_refused(served: World) -> None:
    base = served.client.base_url
    heads = [
        "GET /v1/models HTTP/1.1\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nHost:\r\n\r\n",
        "GET http://localhost/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "GET /v1/models HTTP/1.0\r\n\r\n",
    ]
    for head in heads:
        assert (await answer_to(base.port or 0, head)).partition(b"\r\n")[0].split()[1] in (b"400", b"403"), head
    absolute = "GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    told = await answer_to(base.port or 0, absolute)
    assert told.split()[1] in (b"200", b"400", b"403", b"404")
    assert b"evil" not in told


async def answer_to(port: int, head: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode("latin-1"))
        async with asyncio.timeout(10):
            return await reader.read(4096)
    finally:
        writer.close()


FORGED = {
    "x-forwarded-for": "127.0.0.1",
    "x-forwarded-host": "localhost",
    "x-forwarded-proto": "https",
    "forwarded": "for=127.0.0.1;host=localhost",
    "x-real-ip": "127.0.0.1",
    "x-original-url": "/health",
    "x-rewrite-url": "/health",
    "x-http-method-override": "OPTIONS",
}


async def test_nothing_that_a_proxy_might_have_said_opens_a_door() -> None:
    async with world(config={"api_key": "correct-horse"}) as here:
        for name, value in FORGED.items():
            assert (await here.client.get("/v1/models", headers={name: value})).status_code == 401, name
    async with world() as here:
        reply = await here.client.get("/v1/models", headers=FORGED | {"host": "evil.example"})
        assert reply.status_code == 403
        reply = await here.client.get("/v1/models", headers=FORGED | {"origin": "https://evil.example"})
        assert reply.status_code == 403


PATH_LIKE = [
    "../../etc/passwd",
    "..",
    ".",
    "/etc/passwd",
    "//etc/passwd",
    "~/.ssh/id_rsa",
    "~root",
    "./tiny-chat",
    f"../{MODEL}",
    f"{MODEL}/../../etc",
    f"{MODEL}/../tiny-chat",
    f"/{MODEL}",
    f"{MODEL}/",
    "org/./tiny-chat",
    "org//tiny-chat",
    "org%2Ftiny-chat",
    "org\\tiny-chat",
    "%2e%2e%2fetc%2fpasswd",
    "..\\..\\windows",
    "C:\\models",
    "file:///etc/passwd",
    "http://evil.example/model",
    "hf://org/name",
    f"{MODEL}\x00.txt",
    "\x00",
    "$(id)",
    "`id`",
    "a\r\nx-evil: 1",
    "\u202e",
    "x" * 5000,
]

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHAT["messages"]},
    "/v1/responses": {"input": "x"},
    "/v1/completions": {"prompt": "x"},
    "/v1/messages": {"messages": CHAT["messages"], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
    "/v1/embeddings": {"input": "x"},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/v1/audio/speech": {"input": "x", "voice": "v"},
    "/tokenize": {"prompt": "x"},
    "/load_model": {},
    "/admin/models/load": {},
    "/admin/models/unload": {},
}


@pytest.mark.parametrize("name", PATH_LIKE)
async def test_a_model_s_name_is_never_a_path_on_any_route(called: World, name: str) -> None:
    for path, body in BODIES.items():
        reply = await called.client.post(path, json={**body, "model": name})
        assert reply.status_code in (400, 404), (path, reply.status_code)
        assert "root:" not in reply.text
        assert "x-evil" not in reply.headers
        assert len(reply.text) < 1000, path
    reply = await called.client.post("/v1/audio/transcriptions", data={"model": name}, files={"file": b"RIFF"})
    assert reply.status_code in (400, 404)
    assert called.worker.requests == []
    assert called.placement.asked == []


@pytest.mark.parametrize(
    "path", ["..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%2fetc%2fpasswd", "~", "%00", "a%5c..%5cb"]
)
async def test_a_model_s_name_in_the_url_is_never_a_path(called: World, path: str) -> None:
    for before in ("/v1/models/", "/admin/plan?model=", "/ready?model="):
        reply = await called.client.get(f"{before}{path}")
        assert reply.status_code in (400, 404), before
        assert "root:" not in reply.text


def test_the_check_of_pages_is_pure_and_asks_for_nothing_but_headers() -> None:
    check = PageCheck((), HostCheck("127.0.0.1", ("box.lan",), has_key=False))
    assert check.allows("POST", [])
    assert check.allows("POST", [(b"origin", b"http://box.lan:9000")])
    assert not check.allows("POST", [(b"origin", b"http://box.lan.evil.example")])


SECRET_PLACES = "/srv/secret/model.safetensors at 10.1.2.3:5432"


@pytest.mark.parametrize("kind", [RuntimeError, OSError, PermissionError, KeyError, ConnectionError, MemoryError])
@pytest.mark.parametrize("streams", [False, True])
async def test_no_error_tells_a_path_an_address_or_the_words_of_an_exception(
    served: World, kind: type[Exception], streams: bool
) -> None:
    async def fails(request: Any) -> Any:
        yield text("once ")
        raise kind(SECRET_PLACES)

    served.worker.script = fails
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/messages"):
        reply = await served.client.post(path, json={**BODIES[path], "model": MODEL, "stream": streams})
        assert "error" in reply.text
        leaks = ("secret", "10.1.2.3", kind.__name__, "Traceback", ".py", str(served.directory), "unix:", ".sock")
        assert [word for word in leaks if word in reply.text] == [], path
