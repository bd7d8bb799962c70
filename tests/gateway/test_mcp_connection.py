"""Connections to MCP servers: real processes and sockets below, no gateway above."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hostler.config import HostlerConfig
from hostler.errors import InvalidRequest, PermissionDenied

from gateway.mcp.connection import Connection
from gateway.mcp.remote import McpFault, RemoteTool
from gateway.mcp.servers import McpServers
from tests.gateway import mcp_program

HERE = Path(__file__).parent
VILLAIN = [sys.executable, str(HERE / "mcp_villain.py")]
PROGRAM = [sys.executable, str(HERE / "mcp_program.py")]


@asynccontextmanager
async def servers(**each: dict[str, Any]) -> AsyncIterator[McpServers]:
    config = HostlerConfig.model_validate({"mcp_servers": each})
    here = McpServers(config)
    await here.load()
    try:
        yield here
    finally:
        await here.close()


async def say(connection: Connection, name: str, **arguments: Any) -> str:
    tool = (await connection.list_tools()).find(name)
    assert tool is not None
    return (await connection.call(tool, arguments)).text


async def fault(connection: Connection, name: str, **arguments: Any) -> McpFault:
    with pytest.raises(McpFault) as caught:
        await say(connection, name, **arguments)
    return caught.value


async def test_a_server_over_stdio_answers_and_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTLER_SECRET", "x")
    monkeypatch.setenv("SHOP_TOKEN", "t")
    async with servers(shop={"command": [*PROGRAM, "stdio"], "pass_env": ["SHOP_TOKEN"], "env": {"A": "b"}}) as here:
        shop = here.configured("shop", "x")
        assert await say(shop, "find_order", customer="Ada") == "The order id of Ada is A-17."
        names = set((await say(shop, "environment")).split())
    assert {"A", "SHOP_TOKEN", "PATH"} <= names
    assert not names & {"HOSTLER_SECRET", "PYTHONPATH"}
    assert names - {"A", "SHOP_TOKEN"} < set(os.environ) | {"LC_CTYPE"}


async def test_a_server_that_dies_hangs_or_floods_fails_one_call_and_comes_back() -> None:
    async with servers(villain={"command": VILLAIN, "timeout": "0.5s", "max_result": 100_000}) as here:
        villain = here.configured("villain", "x")
        assert await say(villain, "echo", text="hello") == "hello"
        assert "did not answer the call within 0.5 s" in (await fault(villain, "hang")).message
        assert await say(villain, "echo", text="still here") == "still here"
        assert "exit code 3" in (await fault(villain, "die")).message
        assert "The next try is due in 1 s." in (await fault(villain, "echo")).message
        villain._not_before = 0
        assert "more than 100000 bytes" in (await fault(villain, "flood")).message
        villain._not_before = 0
        assert await say(villain, "echo", text="back") == "back"
        assert (await fault(villain, "refuse")).message == "The MCP server answers: not today"
        assert "secret of" in here.last_words("villain")
        assert "secret" not in str(here.state())


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """Serve an ASGI application and yield its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await asyncio.wait_for(serving, 10)


@pytest.mark.parametrize("kind", ["http", "sse", "auto"])
async def test_a_server_over_http_answers_in_both_ways(kind: str) -> None:
    app = mcp_program.server.streamable_http_app() if kind == "http" else mcp_program.server.sse_app(sse_path="/events")
    path = "/mcp" if kind == "http" else "/events"
    async with listening(app) as url, servers(shop={"url": url + path, "transport": kind}) as here:
        connection = here.configured("shop", "x")
        assert await say(connection, "get_price", order_id="A-17") == "The order A-17 costs 129 euros."
        assert connection.state["transport"] == ("http" if kind == "http" else "sse")
        assert "G-42" in await say(connection, "find_order", customer="Grace")


async def answering(status: int, headers: dict[str, str], body: bytes = b"", times: int = 1) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise RuntimeError
        seen.append((scope["method"], scope["path"]))
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        for _ in range(times):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    seen: list[tuple[str, str]] = []
    app.seen = seen  # type: ignore[attr-defined]
    return app


async def test_no_redirect_is_followed_wherever_it_leads() -> None:
    for location in ("http://169.254.169.254/latest/meta-data/", "/mcp/", "http://localhost/"):
        app = await answering(307, {"location": location})
        async with listening(app) as url, servers(far={"url": f"{url}/mcp"}) as here:
            with pytest.raises(McpFault, match="redirects") as caught:
                await here.configured("far", "x").list_tools()
        assert (caught.value.kind, caught.value.code) == ("http", 307)
        assert set(app.seen) == {("POST", "/mcp")}


async def test_an_endless_reply_over_http_is_cut_off() -> None:
    app = await answering(200, {"content-type": "application/json"}, b"[" * 65536, times=20_000)
    async with listening(app) as url, servers(far={"url": url, "max_result": 10**6}) as here:
        with pytest.raises(McpFault, match="more than 1000000 bytes"):
            await here.configured("far", "x").list_tools()


async def test_a_refusal_names_its_status_and_neither_it_nor_a_log_the_headers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    app = await answering(401, {"content-type": "text/plain"}, b"who are you")
    headers = {"Authorization": "Bearer sesame"}
    server = {"transport": "http", "headers": headers}
    async with listening(app) as url, servers(far={"url": f"{url}/?key=sesame", **server}) as here:
        with pytest.raises(McpFault, match="HTTP 401") as caught:
            await here.configured("far", "x").list_tools()
        assert "sesame" not in caught.value.message + str(here.state()) + caplog.text


async def test_a_server_that_changes_a_tool_loses_that_tool_only() -> None:
    async with servers(villain={"command": VILLAIN}) as here:
        villain = here.configured("villain", "x")
        echo = (await villain.list_tools()).find("echo")
        assert echo is not None
        assert await say(villain, "change") == ""
        await until(lambda: villain._live.has_news)  # type: ignore[union-attr]
        with pytest.raises(McpFault, match="'echo' has changed"):
            await villain.call(echo, {"text": "x"})
        assert "off until hostler is restarted" in (await villain.list_tools()).notes[0]
        assert await say(villain, "sums", text="1+2") == "3"


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_only_the_tools_that_the_configuration_allows_are_seen_or_called() -> None:
    async with servers(villain={"command": VILLAIN, "tools": ["echo"]}) as here:
        villain = here.configured("villain", "x")
        assert [tool.name for tool in (await villain.list_tools()).tools] == ["echo"]
        with pytest.raises(McpFault, match="has no tool 'die'"):
            await villain.call(RemoteTool("die", "Does die.", {}), {})


async def test_a_caller_who_leaves_cancels_its_call_and_harms_no_other() -> None:
    async with servers(villain={"command": VILLAIN}) as here:
        villain = here.configured("villain", "x")
        hanging = asyncio.create_task(say(villain, "hang"))
        assert await say(villain, "echo", text="1") == "1"
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        assert villain.num_running == 0
        assert await say(villain, "echo", text="2") == "2"


async def test_what_cannot_start_says_why() -> None:
    far = {"url": "http://127.0.0.1:1/mcp"}
    missing = {"command": ["/no/such/program"]}
    unset = {"command": VILLAIN, "env": {"A": "${HOSTLER_TEST_NEVER_SET}"}}
    deaf = {"command": ["sleep", "60"], "start_timeout": "0.3s"}
    async with servers(far=far, missing=missing, unset=unset, deaf=deaf) as here:
        expected = {
            "far": "cannot be reached",
            "missing": "there is no '/no/such/program'",
            "unset": "no such environment variable",
            "deaf": "within 0.3 s",
        }
        for name, words in expected.items():
            with pytest.raises(McpFault, match=words):
                await here.configured(name, "x").list_tools()


async def test_addresses_in_requests_lead_to_public_places_only() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return {"metadata.example": ["169.254.169.254"], "mixed.example": ["1.1.1.1", "10.0.0.1"]}[host]

    config = HostlerConfig.model_validate({"mcp_urls": True, "mcp_servers": {"own": {"url": "http://127.0.0.1:1/"}}})
    here = McpServers(config, resolve=resolve)
    try:
        for url in ("http://metadata.example/mcp", "http://mixed.example/mcp"):
            with pytest.raises(McpFault, match="not known as a public one"):
                await here.at_address(url, {}, "me", "p").list_tools()
        for url in ("http://127.0.0.1:6379/", "ftp://a/", "http://u:p@a.example/", "http://a.example:22/"):
            with pytest.raises(InvalidRequest, match="refused"):
                here.at_address(url, {}, "me", "p")
        assert here.at_address("http://127.0.0.1:1/", {}, "me", "p") is here.configured("own", "p")
        mine = here.at_address("http://1.1.1.1/", {"a": "1"}, "me", "p")
        assert here.at_address("http://1.1.1.1/", {"a": "1"}, "me", "p") is mine
        assert here.at_address("http://1.1.1.1/", {"a": "2"}, "me", "p") is not mine
        assert here.at_address("http://1.1.1.1/", {"a": "1"}, "you", "p") is not mine
    finally:
        await here.close()
    with pytest.raises(PermissionDenied):
        McpServers(HostlerConfig()).at_address("http://1.1.1.1/", {}, "me", "p")


async def test_the_collector_rests_while_a_thread_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A past bug: it finalized objects of gRPC in that thread, and everything stood still."""
    seen: list[bool] = []
    monkeypatch.setattr("gateway.mcp.servers._import", lambda: seen.append(gc.isenabled()))
    await McpServers(HostlerConfig()).load()
    assert seen == [False]
    assert gc.isenabled()
