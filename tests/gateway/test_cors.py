"""What web pages may do: nothing by default; with `cors`, what the Fetch standard wants to hear before it lets them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hostler.config import ConfigError, load
from hostler.config import build as build_config

from gateway.app import RATE_HEADERS
from tests.gateway.fakes import MODEL, World, world

KEY = "correct-horse-battery"
ORIGIN = "https://app.example"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}
MESSAGE = {**CHAT, "max_tokens": 9}


def preflight(origin: str = ORIGIN, headers: str = "authorization,content-type", **more: str) -> dict[str, str]:
    """Return what a browser asks before a request with JSON and a key. It never sends the key along."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": headers}
    return {"origin": origin, **asked, **more}


def granted(reply: httpx.Response) -> dict[str, str]:
    return {k.removeprefix("access-control-"): v for k, v in reply.headers.items() if k.startswith("access-control-")}


def config(*origins: str, **more: Any) -> dict[str, Any]:
    return {"cors": origins, "api_key": KEY, **more}


async def test_browsers_get_nothing_unless_cors_is_configured(called: World) -> None:
    reply = await called.client.options("/v1/chat/completions", headers=preflight())
    assert (reply.status_code, granted(reply)) == (204, {})
    reply = await called.client.post("/v1/chat/completions", json=CHAT, headers={"origin": ORIGIN})
    assert granted(reply) == {}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/models", "/", "/nowhere"])
async def test_a_preflight_needs_no_key_and_allows_the_headers_of_every_client(path: str) -> None:
    async with world(over_tcp=False, config=config(ORIGIN)) as here:
        asked = "authorization,content-type,x-api-key,anthropic-version,x-stainless-os"
        reply = await here.client.options(path, headers=preflight(headers=asked))
        assert reply.status_code == 200
        said = granted(reply)
        assert said["allow-origin"] == ORIGIN
        assert set(asked.split(",")) <= {name.strip() for name in said["allow-headers"].lower().split(",")}
        assert {"GET", "POST", "DELETE"} <= {name.strip() for name in said["allow-methods"].split(",")}
        assert "origin" in reply.headers["vary"].lower()


async def test_a_page_on_the_internet_may_reach_a_server_on_the_local_network() -> None:
    async with world(over_tcp=False, config=config(ORIGIN)) as here:
        asked = preflight(**{"access-control-request-private-network": "true"})
        reply = await here.client.options("/v1/chat/completions", headers=asked)
        assert (reply.status_code, granted(reply)["allow-private-network"]) == (200, "true")
        plain = await here.client.options("/v1/chat/completions", headers=preflight())
        assert "allow-private-network" not in granted(plain)
        other = await here.client.options("/v1/chat/completions", headers={**asked, "origin": "https://evil.example"})
        assert "allow-origin" not in granted(other)


@pytest.mark.parametrize("origin", ["tauri://localhost", "http://localhost:3000", "null"])
async def test_an_allow_list_lets_in_whom_it_names_and_nobody_else(origin: str) -> None:
    async with world(over_tcp=False, config=config(ORIGIN, origin)) as here:
        key = {"authorization": f"Bearer {KEY}"}
        reply = await here.client.post("/v1/chat/completions", json=CHAT, headers={**key, "origin": origin})
        assert (reply.status_code, granted(reply)["allow-origin"]) == (200, origin)
        for stranger in ("https://evil.example", "https://app.example.evil.example", "http://app.example"):
            refused = await here.client.options("/v1/chat/completions", headers=preflight(stranger))
            assert refused.status_code == 400
            assert "allow-origin" not in granted(refused)
            reply = await here.client.get("/v1/models", headers={**key, "origin": stranger})
            assert "allow-origin" not in granted(reply)


async def test_a_star_lets_every_page_in_that_has_the_key() -> None:
    async with world(over_tcp=False, config=config("*")) as here:
        reply = await here.client.options("/v1/messages", headers=preflight("https://any.example"))
        assert (reply.status_code, granted(reply)["allow-origin"]) == (200, "*")
        headers = {"origin": "https://any.example", "x-api-key": KEY}
        reply = await here.client.post("/v1/messages", json=MESSAGE, headers=headers)
        assert (reply.status_code, granted(reply)["allow-origin"]) == (200, "*")
        # With credentials a page could use cookies, which nobody here sets.
        assert "allow-credentials" not in granted(reply)


async def test_pages_can_read_ids_and_when_to_try_again() -> None:
    async with world(over_tcp=False, config=config(ORIGIN)) as here:
        headers = {"origin": ORIGIN, "x-api-key": KEY}
        reply = await here.client.post("/v1/messages", json=MESSAGE, headers=headers)
        exposed = {name.strip() for name in granted(reply)["expose-headers"].split(",")}
        assert exposed == {"x-request-id", "request-id", "retry-after", *RATE_HEADERS}
        assert {"x-request-id", "request-id"} <= set(reply.headers)


async def test_pages_can_read_every_error() -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("unexpected")

    async with world(over_tcp=False, config=config(ORIGIN, max_body=2000)) as here:
        key = {"origin": ORIGIN, "x-api-key": KEY}
        client, path = here.client, "/v1/chat/completions"
        replies = [
            await client.post(path, json=CHAT, headers={"origin": ORIGIN}),
            await client.post(path, json=CHAT, headers={**key, "host": "evil.example"}),
            await client.post(path, json={**CHAT, "model": "none"}, headers=key),
            await client.get(path, headers=key),
            await client.post(path, json={"x": "y" * 3000}, headers=key),
            await client.post(path, content=b"x", headers={**key, "content-type": "text/plain"}),
            await client.post(path, json={}, headers=key),
        ]
        here.app.state.services.dispatcher.generate = explode
        replies.append(await client.post(path, json=CHAT, headers=key))
        replies.append(await client.post("/v1/messages", json=MESSAGE, headers=key))
    assert [reply.status_code for reply in replies] == [401, 403, 404, 405, 413, 415, 400, 500, 500]
    for reply in replies:
        assert granted(reply)["allow-origin"] == ORIGIN, reply.status_code
        assert reply.json()["error"]["message"]


async def test_pages_can_read_streams(tmp_path: Any) -> None:
    async with world(config=config(ORIGIN)) as here:
        headers = {"origin": ORIGIN, "x-api-key": KEY}
        reply = await here.client.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers)
        assert granted(reply)["allow-origin"] == ORIGIN
        assert reply.text.endswith("data: [DONE]\n\n")


def test_origins_are_read_from_a_file_and_from_the_environment() -> None:
    assert build_config({"cors": ["https://a.example", "*"]}).cors == ("https://a.example", "*")
    environ = {"HOSTLER_CORS": "https://a.example, tauri://localhost"}
    assert load(environ=environ).cors == ("https://a.example", "tauri://localhost")


@pytest.mark.parametrize("origin", ["https://a.example/", "https://a.example/app", "a.example", "", "https://", "**"])
def test_what_no_browser_would_ever_send_as_its_origin_stops_the_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="cors"):
        build_config({"cors": [origin]})
