"""The application behind a tunnel: what is there, for whom, under which names; and that the local one stays whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from hostler.config import ConfigError, HostlerConfig
from hostler.inference.v1 import inference_pb2 as pb
from starlette.routing import Route

from gateway.app import create_app
from gateway.public_app import PUBLIC, create_public_app
from tests.gateway.fakes import MODEL, QUICK, World, echo, route, world

KEY = "sesame-open-up"
NAME = "llm.example.org"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}
CONFIG: dict[str, Any] = {"api_key": KEY, "public": {"enabled": True, "hosts": [NAME]}}
KEYS = {"none": {}, "wrong": {"Authorization": "Bearer sesame-open-uq"}, "right": {"Authorization": f"Bearer {KEY}"}}


@pytest.fixture
async def both() -> AsyncIterator[World]:
    async with world(config=CONFIG) as here:
        yield here


def outside(here: World, key: str = "right", host: str = NAME) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=here.public_url, headers={"Host": host, **KEYS[key]}, timeout=10)


def routes_of(app: FastAPI) -> list[Route]:
    return [route for route in app.router.routes if isinstance(route, Route)]


def every_path() -> list[str]:
    """Return each path that the local application has, filled, and some that nobody has."""
    paths = {route.path for route in routes_of(create_app(HostlerConfig(api_key=KEY), placement_target="unix:/x"))}
    filled = {path.replace("{model:path}", MODEL) for path in paths}
    return sorted({p.replace("{", "").replace("}", "") for p in filled} | {"/docs", "/redoc", "/admin", "/nothing"})


async def raw(url: str, text: str) -> bytes:
    """Send bytes that no client library would, and return the reply's first line."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(text.replace("\n", "\r\n").encode())
        return await asyncio.wait_for(reader.readline(), 5)
    finally:
        writer.close()


def test_everything_listed_is_there_and_nothing_else() -> None:
    services = create_app(HostlerConfig(**CONFIG), placement_target="unix:/x").state.services
    served = {(m, r.path) for r in routes_of(create_public_app(services)) for m in r.methods or ()}
    assert served == PUBLIC
    for word in ("admin", "metrics", "openapi", "ready", "load_model", "mcp"):
        assert not [path for _, path in served if word in path]


def test_without_a_key_it_is_not_built() -> None:
    services = create_app(HostlerConfig(public=CONFIG["public"]), placement_target="unix:/x").state.services
    with pytest.raises(ConfigError, match="api_key"):
        create_public_app(services)


@pytest.mark.parametrize("key", list(KEYS))
async def test_no_route_and_method_lets_a_stranger_in(both: World, key: str) -> None:
    public = {path.replace("{model:path}", MODEL).replace("{", "").replace("}", "") for _, path in PUBLIC}
    async with outside(both, key) as http:
        for path in every_path():
            for method in METHODS:
                status = (await http.request(method, path)).status_code
                asked = f"{method} {path} with {key} key: {status}"
                if path not in public:
                    assert status == 404, asked
                elif method in ("HEAD", "OPTIONS"):  # clients probe with these; they tell nothing
                    assert status in (200, 204), asked
                elif key != "right":
                    assert status == (200 if (method, path) == ("GET", "/health") else 401), asked
                elif method in ("PUT", "PATCH"):
                    assert status == 405, asked
                else:
                    assert status != 401, asked


async def test_probes_of_clients_are_answered_without_a_key(both: World) -> None:
    async with outside(both, "none") as http:
        assert (await http.head("/")).status_code == 200
        assert (await http.options("/v1/chat/completions")).status_code == 204
        health = await http.get("/health")
    assert health.json() == {"status": "ok"}


async def test_models_answer_outside_and_administration_stays_inside(both: World) -> None:
    async with outside(both) as http:
        assert (await http.post("/v1/chat/completions", json=CHAT)).json()["choices"][0]["message"]
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == MODEL
        assert (await http.get("/admin/status")).status_code == 404
    assert (await both.client.get("/admin/status", headers=KEYS["right"])).status_code == 200
    assert (await both.client.get("/metrics", headers=KEYS["right"])).status_code == 200


FORWARDED = {
    "X-Forwarded-For": "127.0.0.1",
    "X-Forwarded-Host": NAME,
    "X-Forwarded-Proto": "https",
    "Forwarded": f"for=127.0.0.1;host={NAME}",
    "X-Real-IP": "127.0.0.1",
    "X-Original-URL": "/admin/status",
    "X-Rewrite-URL": "/admin/status",
}


async def test_forwarded_headers_open_nothing(both: World) -> None:
    async with outside(both, "none") as http:
        assert (await http.get("/v1/models", headers=FORWARDED)).status_code == 401
    async with outside(both, host="evil.example") as http:
        assert (await http.get("/v1/models", headers=FORWARDED)).status_code == 403
    async with outside(both) as http:
        assert (await http.get("/v1/models", headers=FORWARDED)).json()["object"] == "list"
        assert (await http.get("/admin/status", headers=FORWARDED)).status_code == 404
    refused = await both.client.get("/v1/models", headers={**FORWARDED, **KEYS["right"], "Host": "evil.example"})
    assert refused.status_code == 403


CONFUSED = (
    "Host: 127.0.0.1.evil.com\n",
    "Host: localhost@evil.com\n",
    "Host: evil.com#@localhost\n",
    "Host: \n",
    f"Host: {NAME}.evil.com\n",
    f"Host: evil.com\nX-Forwarded-Host: {NAME}\n",
    f"Host: {NAME}\nHost: evil.com\n",
    f"Host: evil.com\nHost: {NAME}\n",
    "Host: localhost\nHost: localhost\n",
)


@pytest.mark.parametrize("hosts", CONFUSED)
async def test_a_confused_host_is_refused_by_both(both: World, hosts: str) -> None:
    end = f"{hosts}Authorization: Bearer {KEY}\n\n"
    for url in (both.url, both.public_url):
        for target in ("/v1/models", f"http://{NAME}/v1/models", "http://localhost/v1/models"):
            line = await raw(url, f"GET {target} HTTP/1.1\n{end}")
            assert line.split()[1] in (b"400", b"403"), (url, target, line)


async def test_each_application_answers_to_its_own_names_only(both: World) -> None:
    end = f"Authorization: Bearer {KEY}\n\n"
    for url, name, status in (
        (both.url, "localhost", b"200"),
        (both.url, NAME, b"403"),
        (both.public_url, "localhost", b"403"),
        (both.public_url, "127.0.0.1", b"403"),
        (both.public_url, NAME, b"200"),
        (both.public_url, f"{NAME.upper()}.:443", b"200"),
    ):
        assert (await raw(url, f"GET /v1/models HTTP/1.1\nHost: {name}\n{end}")).split()[1] == status, (url, name)


async def test_the_tunnels_name_counts_while_the_tunnel_tells_it(both: World) -> None:
    told = both.directory / "tunnel.json"
    async with outside(both, host="roundhouse.ngrok-free.app") as http:
        assert (await http.get("/v1/models")).status_code == 403
        told.write_text(json.dumps({"url": "https://roundhouse.ngrok-free.app"}))
        assert (await http.get("/v1/models")).status_code == 200
        told.write_text("{half")
        assert (await http.get("/v1/models")).status_code == 403
        told.write_text(json.dumps({"url": "https://roundhouse.ngrok-free.app"}))
        assert (await http.get("/v1/models")).status_code == 200
        told.unlink()
        assert (await http.get("/v1/models")).status_code == 403


async def test_a_stream_shows_life_before_its_first_token() -> None:
    release = asyncio.Event()

    async def slow(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        await release.wait()
        async for event in echo(request):
            yield event

    async with world(config=CONFIG, patience=replace(QUICK, ping_s=60, first_ping_s=60)) as here:
        here.worker.script = slow
        async with outside(here) as http:
            body = {**CHAT, "stream": True}
            async with asyncio.timeout(5), http.stream("POST", "/v1/chat/completions", json=body) as reply:
                pieces = reply.aiter_bytes()
                assert (await anext(pieces)).startswith(b":")
                release.set()
                assert b"[DONE]" in b"".join([piece async for piece in pieces])


@pytest.mark.parametrize("allowed", [False, True])
async def test_addresses_are_fetched_for_strangers_only_if_it_is_said(allowed: bool) -> None:
    public = {**CONFIG["public"], "fetch_urls": allowed}
    async with world(config={**CONFIG, "fetch_urls": True, "mcp_urls": True, "public": public}) as here:
        await here.publish(route(here.worker, supports_images=True, supports_tools=True))
        image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
        body = {"model": MODEL, "messages": [{"role": "user", "content": [image]}]}
        tool = {"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1/mcp"}
        asked = {"model": MODEL, "input": "hello", "tools": [tool]}
        async with outside(here) as http:
            seen = (await http.post("/v1/chat/completions", json=body)).text
            called = (await http.post("/v1/responses", json=asked)).text
        inside = (await here.client.post("/v1/chat/completions", json=body, headers=KEYS["right"])).text
    assert ("calls only the MCP servers of its configuration" in called) is not allowed, called
    assert ("does not fetch addresses" in seen) is not allowed, seen
    assert "does not fetch addresses" not in inside


async def test_a_stop_ends_both_listeners(both: World) -> None:
    assert both.server is not None
    both.server.stop()
    for url in (both.url, both.public_url):
        where = urlsplit(url)
        async with asyncio.timeout(5):
            while True:
                try:
                    _, writer = await asyncio.open_connection(where.hostname, where.port)
                except ConnectionRefusedError:
                    break
                writer.close()
                await asyncio.sleep(0.02)
