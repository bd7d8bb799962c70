"""The commands that look and change nothing: ps, plan, events.

Above stands `cli.main`, which imports this file only when one of them runs; below, `cli.placement` and the files that
draw (`ps_screen`, `plan_words`, `event_words`). With `as_json` standard output carries JSON and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from hostler import errors
from hostler.placement_json import event_json, plan_json, status_json

from cli import event_words, placement, plan_words, ps_screen, restarts, servers
from cli.exits import CliError
from cli.hints import hinted

if TYPE_CHECKING:
    from rich.console import Console, Group

_RETRY_S = 1.0


def show_json(value: Any) -> None:
    """Print one JSON value: indented on a terminal, one line in a pipe."""
    indent = 2 if sys.stdout.isatty() else None
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def show_json_line(value: Any) -> None:
    """Print one JSON value of a stream of them, on one line, at once."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


async def sample(server: servers.Server) -> dict[str, Any]:
    """Return a server's status as `hostler ps --json` shows it."""
    ended = restarts.recent(server.run_dir)
    try:
        async with placement.connect(server.run_dir) as client:
            status = await client.status()
    except errors.OrchestratorAway as error:
        raise errors.OrchestratorAway(" ".join([error.message, *map(restarts.in_words, ended)])) from None
    values = status_json(status, int(time.time() * 1000))
    return {"port": server.port, "pid": server.pid, **values, "restarts": ended}


def ps(port: int | None, as_json: bool, watch: bool, interval_s: float) -> None:
    """Show devices and models, once or until Ctrl-C."""
    server = servers.find(port)
    if watch:
        asyncio.run(_watch(server, as_json, interval_s))
        return
    values = asyncio.run(sample(server))
    if as_json:
        show_json(values)
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_screen(values, console))


def _screen(values: dict[str, Any], console: Console) -> Group:
    plain = not console.is_terminal or console.no_color or console.is_dumb_terminal
    return ps_screen.draw_status(values, console.width, plain=plain)


async def _watch(server: servers.Server, as_json: bool, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False, stderr=as_json)
    with Live(Text("…"), console=console, auto_refresh=False, screen=not as_json) as live:
        while True:
            try:
                values = await sample(server)
            except errors.OrchestratorAway as error:
                # It may be restarting under its supervisor; with that gone, too, there is nothing to watch.
                servers.find(server.port)
                live.update(Text(error.message, style="yellow"), refresh=not as_json)
            else:
                if as_json:
                    show_json_line(values)
                else:
                    live.update(_screen(values, console), refresh=True)
            await asyncio.sleep(interval_s)


def plan(port: int | None, model: str, as_json: bool) -> None:
    """Say what a load would do now; fails if it could not be done."""
    server = servers.find(port)

    async def call() -> dict[str, Any]:
        async with placement.connect(server.run_dir) as client:
            return plan_json(model, await client.plan(model))

    with hinted(server, model):
        values = asyncio.run(call())
    if as_json:
        show_json(values)
    else:
        _print_plan(values)
    if not values["feasible"]:
        raise CliError(f"{model} cannot be brought up now; `hostler ps` shows what is in the way")


def _print_plan(values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(plan_words.verdict(values), style="bold green" if values["feasible"] else "bold red"))
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in plan_words.lines(values):
        table.add_row(f"  {label}", Text(text))
    console.print(table)


def events(port: int | None, num_past: int, follow: bool, as_json: bool) -> None:
    """Show the latest events, oldest first, and with `follow` each new one until Ctrl-C."""
    server = servers.find(port)
    asyncio.run(_follow(server, num_past, as_json) if follow else _past(server, num_past, as_json))


async def _past(server: servers.Server, num_past: int, as_json: bool) -> None:
    show = _Lines(as_json)
    async with placement.connect(server.run_dir) as client:
        async for event in client.events(num_past, past_only=True):
            show(event_json(event))
    if not show.num_shown and not as_json:
        sys.stderr.write("nothing has happened since the orchestrator started\n")


async def _follow(server: servers.Server, num_past: int, as_json: bool) -> None:
    """Go on when the orchestrator restarts: its events then begin anew, and none is shown twice."""
    show = _Lines(as_json)
    seen: tuple[int, int] | None = None
    while True:
        try:
            async with placement.connect(server.run_dir) as client:
                # Later on all are asked for, for some may have been missed.
                async for event in client.events(num_past if seen is None else 0, past_only=False):
                    if seen is None or event.number > seen[0] or event.unix_ms > seen[1]:
                        seen = event.number, event.unix_ms
                        show(event_json(event))
        except errors.OrchestratorAway as error:
            show.complain(error.message)
        servers.find(server.port)
        await asyncio.sleep(_RETRY_S)


class _Lines:
    """Prints events as they come."""

    def __init__(self, as_json: bool) -> None:
        self.num_shown = 0
        self._has_complained = False
        self._as_json = as_json
        self._console: Console | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        self.num_shown += 1
        self._has_complained = False
        if self._as_json:
            show_json_line(event)
            return
        from rich.console import Console
        from rich.text import Text

        if self._console is None:
            self._console = Console(highlight=False)
        text = Text.assemble(
            (event_words.when(event["unix_ms"], time.time()), "dim"),
            " ",
            (event_words.what(event), event_words.STYLES.get(event["kind"], "")),
            (f": {event['why']}" if event["why"] else "", "dim"),
        )
        # Long lines are left to the terminal to wrap, so that they copy whole.
        self._console.print(text, soft_wrap=True)
        sys.stdout.flush()

    def complain(self, message: str) -> None:
        """Say on standard error, once until events come again, why none come."""
        if not self._has_complained:
            sys.stderr.write(f"hostler: {message}\n")
        self._has_complained = True
