"""/admin/mcp: which MCP servers are configured, how they are, and a try of one. Above: `app`; below: `gateway.mcp`.

What it tells is of the process that was asked: each gateway process has its own connections.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from gateway.admin_door import admin_door
from gateway.body import read_json
from gateway.fields import Fields
from gateway.json_response import json_response
from gateway.mcp.remote import McpFault
from gateway.mcp.servers import McpServers
from gateway.services import services_of

router = APIRouter(prefix="/admin/mcp", dependencies=[Depends(admin_door)])

_MAX_BODY_BYTES = 64 * 1024
_MAX_NAME_CHARS = 64


@router.get("", response_model=None)
async def list_servers(request: Request) -> Response:
    """List the configured servers, without starting any."""
    return json_response({"object": "list", "data": services_of(request).mcp.state()})


@router.post("/test", response_model=None)
async def test_server(request: Request) -> Response:
    """Connect to a server, if need be, and list its tools anew."""
    services = services_of(request)
    fields = Fields(await read_json(request.headers, request.receive, _MAX_BODY_BYTES))
    name = fields.string("server", _MAX_NAME_CHARS)
    if not name:
        raise fields.missing("server")
    tested = await services.lifetime.until_gone(request.receive, _test(services.mcp, name))
    return json_response(tested)


async def _test(servers: McpServers, name: str) -> dict[str, Any]:
    await servers.load()
    connection = servers.configured(name, "server")
    began = time.monotonic()
    listing, error = None, None
    try:
        listing = await connection.list_anew()
    except McpFault as fault:
        error = fault.message
    took_ms = round((time.monotonic() - began) * 1000)
    tools = listing.tools if listing is not None else ()
    return {
        "server": name,
        "ok": error is None,
        "took_ms": took_ms,
        **connection.state,
        "error": error,
        "tools": [
            {"name": tool.name, "description": tool.description, "read_only": tool.is_read_only} for tool in tools
        ],
        "notes": list(listing.notes) if listing is not None else [],
        # Only for who administers: a server may write anything there.
        "stderr": servers.last_words(name) if error is not None else "",
    }
