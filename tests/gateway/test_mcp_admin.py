"""/admin/mcp: what who administers sees of the configured MCP servers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.fakes import World, world
from tests.gateway.test_responses_mcp import VILLAIN


@pytest.fixture
async def here() -> AsyncIterator[World]:
    servers = {
        "villain": {**VILLAIN, "env": {"TOKEN": "sesame"}, "tools": ["echo"]},
        "broken": {"command": ["sh", "-c", "echo no token >&2; exit 5"]},
        "far": {"url": "http://127.0.0.1:1/mcp?key=sesame", "headers": {"Authorization": "Bearer sesame"}},
    }
    async with world(over_tcp=False, config={"mcp_servers": servers}) as here:
        yield here


async def test_servers_are_listed_without_being_started_or_showing_secrets(here: World) -> None:
    reply = await here.client.get("/admin/mcp")
    servers = reply.json()["data"]
    assert [(server["name"], server["state"]) for server in servers] == [
        ("villain", "not started"),
        ("broken", "not started"),
        ("far", "not started"),
    ]
    assert "sesame" not in reply.text


async def test_a_test_connects_and_tells_the_tools_or_the_servers_last_words(here: World) -> None:
    good = (await here.client.post("/admin/mcp/test", json={"server": "villain"})).json()
    assert (good["ok"], good["state"], good["transport"]) == (True, "connected", "stdio")
    assert good["tools"] == [{"name": "echo", "description": "Does echo.", "read_only": True}]
    assert (await here.client.post("/admin/mcp/test", json={"server": "villain"})).json()["ok"]
    for _ in range(2):  # the second one does not wait for its turn
        bad = (await here.client.post("/admin/mcp/test", json={"server": "broken"})).json()
        assert (bad["ok"], bad["stderr"]) == (False, "no token")
        assert bad["error"] == "The MCP server ended with exit code 5."
    states = {server["name"]: server["state"] for server in (await here.client.get("/admin/mcp")).json()["data"]}
    assert states == {"villain": "connected", "broken": "failed", "far": "not started"}
    unknown = await here.client.post("/admin/mcp/test", json={"server": "x"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "server")
    page = await here.client.get("/admin/mcp", headers={"origin": "https://evil.example"})
    assert page.status_code == 403
