"""`hostler servers`: the servers of this user that run on this machine. Above: `cli.remote_commands`; below: `servers`.

Its JSON is read by the hostler of another machine (`cli.remote.far_side`), maybe of another release: what changes the
meaning of a field raises `VERSION`; new fields do not.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from hostler import __version__
from hostler.config import is_loopback

from cli import servers
from cli.servers import Server

VERSION = 1


def described(server: Server, *, with_key: bool) -> dict[str, Any]:
    """Return one server as JSON. Its key only if asked for: it then stands wherever the output goes."""
    config = servers.read_config(server.run_dir)
    host = str(config.get("host", "127.0.0.1"))
    key = config.get("api_key")
    socket = server.run_dir.gateway_socket
    return {
        "port": server.port,
        "pid": server.pid,
        "host": host,
        "url": servers.base_url(host, server.port),
        "socket": str(socket) if socket.is_socket() else None,
        "needs_key": key is not None or bool(config.get("require_key")) or not is_loopback(host),
        "models": [str(model["name"]) for model in config.get("models", ())],
        **({"api_key": key} if with_key and key is not None else {}),
    }


def show(as_json: bool, *, with_key: bool) -> None:
    """Show every live server of this user."""
    found = [described(server, with_key=with_key) for server in servers.live()]
    if as_json:
        listing = {"version": VERSION, "hostler": __version__, "servers": found}
        sys.stdout.write(json.dumps(listing, ensure_ascii=False) + "\n")  # one line: the far side's script wants it so
        return
    if not found:
        sys.stdout.write(servers.NOT_RUNNING + "\n")
    for each in found:
        key = f", key {each['api_key']}" if "api_key" in each else ", key demanded" if each["needs_key"] else ""
        sys.stdout.write(f"{each['url']}/v1  pid {each['pid']}, {', '.join(each['models']) or 'no model'}{key}\n")
