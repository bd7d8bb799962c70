"""`hostler mcp list` and `hostler mcp test`: what the running server says of its MCP servers.

Above stands `cli.mcp_commands`; below, `/admin/mcp` over HTTP.
"""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any

from cli.chat import connect
from cli.exits import CliError
from cli.seeing import show_json

_MAX_DESCRIPTION = 100


def show_servers(url: str | None, api_key: str | None, port: int | None, as_json: bool) -> None:
    """Show the configured servers."""
    with closing(connect(url, api_key, port)) as client:
        servers: list[dict[str, Any]] = client.call("GET", "/admin/mcp")["data"]
    if as_json:
        show_json(servers)
        return
    if not servers:
        sys.stdout.write("no MCP servers are configured; hostler.yaml takes them under mcp_servers\n")
    for server in servers:
        sys.stdout.write("".join(f"{line}\n" for line in describe(server)))


def describe(server: dict[str, Any]) -> list[str]:
    """Return the lines for one server."""
    allowed = server["tools"]
    notes = [
        server["state"],
        "chat" if server["chat"] else "",
        "" if allowed is None else f"{len(allowed)} tools allowed",
    ]
    lines = [f"{server['name']}: {server['target']} ({', '.join(note for note in notes if note)})"]
    return [*lines, f"  {server['error']}"] if server["error"] else lines


def try_out(name: str, url: str | None, api_key: str | None, port: int | None, as_json: bool) -> None:
    """Have a server tried, and show what came of it.

    Raises:
        CliError: it does not work.
    """
    with closing(connect(url, api_key, port)) as client:
        tested = client.call("POST", "/admin/mcp/test", {"server": name})
    if as_json:
        show_json(tested)
    elif tested["ok"]:
        how = f"over {tested['transport']}, {tested['took_ms']} ms, {len(tested['tools'])} tools"
        sys.stdout.write(f"{name}: {tested['state']} ({how})\n")
        for tool in tested["tools"]:
            first_line = " ".join(tool["description"].split())[:_MAX_DESCRIPTION]
            mark = " (read only)" if tool["read_only"] else ""
            sys.stdout.write(f"  {tool['name']}{mark}: {first_line}\n")
        for note in tested["notes"]:
            sys.stdout.write(f"  {note}\n")
    if not tested["ok"]:
        said = f"\nit wrote: {tested['stderr']}" if tested["stderr"] else ""
        raise CliError(f"{name}: {tested['error']} ({tested['took_ms']} ms){said}")
