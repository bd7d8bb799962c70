"""`hostler remote`: looks at the far side, starts a server there if asked, and keeps a forward to it.

Above: `cli.remote_commands`; below: `far_side`, `start`, `forward`. Ctrl-C is the way to end it, and ends with 0.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from cli import report
from cli.exits import CliError
from cli.remote import far_side, forward, ssh
from cli.remote.far_side import FarServer, FarSide
from cli.remote.start import start

_NUM_PORTS_TRIED = 100


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for."""

    local_port: int | None = None
    remote_port: int | None = None
    start: bool = False
    program: str | None = None
    with_key: bool = False


def remote(route: ssh.Route, wish: Wish, *, as_json: bool) -> None:
    """Bring the far server to a port of this machine and keep it there until Ctrl-C.

    Raises:
        CliError: the far side cannot be reached, has no hostler, or runs no server; says what to do.
    """
    news = report.make(as_json)
    effects = forward.Real()
    try:
        with _signals_as_interrupt():
            found = far_side.look(route, wish.program, with_key=wish.with_key)
            if wish.start and not _runs(found, wish.remote_port):
                start(route, found.program or "", wish.remote_port, news)
                found = far_side.look(route, wish.program, with_key=wish.with_key)
            server = choose(found, wish.remote_port, route.destination)
            port = choose_port(wish.local_port, server.port, effects)
            keeper = forward.Keeper(
                route,
                port,
                server.targets,
                news,
                on_first_up=lambda: _banner(news, route.destination, found, server, port),
                may_ask=sys.stdin.isatty(),
                effects=effects,
            )
            keeper.run()
    except KeyboardInterrupt:
        news.say("ended", "the connection is closed; what runs there goes on", "dim")
    finally:
        news.close()


@contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """End on SIGTERM and SIGHUP as on Ctrl-C, so that ssh is not left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _runs(found: FarSide, port: int | None) -> bool:
    return any(port in (None, server.port) for server in found.servers)


def choose(found: FarSide, port: int | None, host: str) -> FarServer:
    """Return the far server that is meant.

    Raises:
        CliError: none, or several and no port was given.
    """
    ports = ", ".join(str(server.port) for server in found.servers)
    if not found.servers:
        raise CliError(f"no hostler is running on {host} for this user; start one with `hostler remote {host} --start`")
    if port is None:
        if len(found.servers) > 1:
            raise CliError(f"several are running on {host} (ports {ports}); say which with --remote-port")
        return found.servers[0]
    for server in found.servers:
        if server.port == port:
            return server
    raise CliError(f"no hostler is running on port {port} of {host} (but on {ports}); --start would start one")


def choose_port(wished: int | None, usual: int, effects: forward.Effects) -> int:
    """Return the local port: the wished one, else the far one's number or the next that is free.

    Raises:
        CliError: the wished port is taken.
    """
    if wished is not None:
        if not effects.is_free(wished):
            raise CliError(f"port {wished} of this machine is taken by another program; choose another with --port")
        return wished
    usual = usual if usual >= 1024 else 8000
    for port in range(usual, min(usual + _NUM_PORTS_TRIED, 65536)):
        if effects.is_free(port):
            return port
    raise CliError(f"ports {usual} to {usual + _NUM_PORTS_TRIED - 1} of this machine are taken; choose one with --port")


def _banner(news: report.Reporter, host: str, found: FarSide, server: FarServer, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    fields = {
        "url": f"{url}/v1",
        "host": host,
        "version": found.version,
        "models": list(server.models),
        "needs_key": server.needs_key,
        **({"api_key": server.api_key} if server.api_key else {}),
    }
    lines = [f"{url}/v1 is hostler {found.version} on {host} ({found.system}{_gpus(found.gpus)})"]
    lines.append(f"  models   {', '.join(server.models) or 'none'}")
    if server.api_key:
        lines.append(f"  key      export HOSTLER_API_KEY={server.api_key}")
    elif server.needs_key and not os.environ.get("HOSTLER_API_KEY"):
        lines.append("  key      it demands one: export HOSTLER_API_KEY=…  (--with-key reads it from there)")
    elif server.needs_key:
        lines.append("  key      that in $HOSTLER_API_KEY, if it is this server's")
    lines.append(f"  try      hostler chat --url {url}")
    lines.append(f"  clients  hostler connect NAME --url {url}")
    news.say("up", "\n".join(lines), "good", **fields)
    news.say("hint", "The connection is kept up. Ctrl-C ends it.", "dim")


def _gpus(names: tuple[str, ...]) -> str:
    if not names:
        return ""
    return f", {names[0]}" if len(names) == 1 else f", {len(names)} GPUs: {', '.join(sorted(set(names)))}"
