"""`hostler logs`: what the processes of one server have written, merged by time.

Above stands `cli.main`; below, `cli.log_files`. Needs no living server: why one ended is asked after its end.
"""

from __future__ import annotations

import heapq
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer
from hostler import rundir
from hostler.rundir import RunDir

from cli import log_files, log_lines, servers
from cli.exits import CliError, UsageError, friendly
from cli.flags import Json, Port, examples
from cli.log_lines import Choice, Entry

_LOOK_EVERY_S = 0.25
_LEVELS = ("debug", "info", "warning", "error", "critical")
_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red", "DEBUG": "bright_black"}

_EXAMPLES = examples(
    "hostler logs                                the last 100 entries of all processes",
    "hostler logs gateway worker --follow        theirs, as they come",
    "hostler logs --since 10m --level warning",
    "hostler logs --request-id req_8f0d…         one request's way through all processes",
)


def logs(
    process: Annotated[
        list[str] | None,
        typer.Argument(help="Only these: gateway, orchestrator, ray_head, worker, or one of them (gateway-0)."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones; Ctrl-C ends it.")] = False,
    num_entries: Annotated[int, typer.Option("--lines", "-n", min=0, help="So many past entries at most.")] = 100,
    since: Annotated[str | None, typer.Option(help="None older: 30s, 10m, 2h, 1d, 14:05 or a date and time.")] = None,
    level: Annotated[str, typer.Option(help=f"None below: {', '.join(_LEVELS)}.")] = "debug",
    request_id: Annotated[str, typer.Option(help="Only entries about this x-request-id.")] = "",
    as_json: Json = False,
    port: Port = None,
) -> None:
    """Show what a server's processes have logged, in the order of time."""
    if level.lower() not in _LEVELS:
        raise UsageError(f"--level {level!r} is none of {', '.join(_LEVELS)}")
    try:
        since_unix_s = log_lines.read_since(since, time.time()) if since is not None else 0.0
    except ValueError:
        raise UsageError(f"--since {since!r} is no time; write 10m, 2h, 14:05 or 2026-11-01T14:05") from None
    choice = Choice(since_unix_s, logging.getLevelNamesMapping()[level.upper()], request_id)
    run_dir = find_run_dir(port)
    names = tuple(process or ())
    printer = _Printer(as_json)
    files = chosen(run_dir, names)
    tails = {file.path: log_files.Tail(file) for file in files if not file.path.name.endswith(".1")}
    for tail in tails.values():
        tail.to_end()
    # Only up to where following begins: nothing is shown twice or left out.
    for entry in past(files, {path: tail.offset for path, tail in tails.items()}, choice, num_entries):
        printer.show(entry)
    while follow:
        time.sleep(_LOOK_EVERY_S)
        for entry in fresh(run_dir, names, tails):
            if choice.takes(entry):
                printer.show(entry)


def find_run_dir(port: int | None) -> RunDir:
    """Return the run directory whose logs are meant: of a living server, else of one that has ended.

    Raises:
        CliError: there is none, or more than one.
    """
    try:
        return servers.find(port).run_dir
    except UsageError:
        raise
    except CliError:
        if port is None and servers.live():
            raise
        ended = [(known, run_dir) for known, run_dir in rundir.existing() if port in (None, known)]
        if not ended:
            raise
        if len(ended) > 1:
            ports = ", ".join(str(known) for known, _ in ended)
            raise CliError(f"none is running, and several have run (ports {ports}); say which with --port") from None
        return ended[0][1]


def chosen(run_dir: RunDir, names: tuple[str, ...]) -> list[log_files.LogFile]:
    """Return the log files of the processes that `names` mean; without names, all.

    Raises:
        UsageError: a name means none.
    """
    files = log_files.find(run_dir)
    for name in names:
        if not any(_is_meant(file.process, (name,)) for file in files):
            there = ", ".join(dict.fromkeys(file.process for file in files)) or "none"
            raise UsageError(f"no log of {name!r} here; there are: {there}")
    return [file for file in files if _is_meant(file.process, names)]


def _is_meant(process: str, names: tuple[str, ...]) -> bool:
    return not names or any(process == name or process.startswith(f"{name}-") for name in names)


def past(
    files: Iterable[log_files.LogFile], ends: Mapping[Path, int], choice: Choice, num_entries: int
) -> Iterable[Entry]:
    """Return the last entries that `choice` takes, of all files together, in the order of time.

    Args:
        ends: how many bytes of a file to read; a file that is not in it is read to its end.
    """
    streams = [log_lines.entries(log_files.lines(file.path, ends.get(file.path)), file.process) for file in files]
    merged: Iterator[Entry] = heapq.merge(*streams, key=lambda entry: entry.unix_s)
    return deque((entry for entry in merged if choice.takes(entry)), maxlen=num_entries)


def fresh(run_dir: RunDir, names: tuple[str, ...], tails: dict[Path, log_files.Tail]) -> list[Entry]:
    """Return what was added since the last look, in the order of time; new processes join in."""
    for file in log_files.find(run_dir):
        if not file.path.name.endswith(".1") and _is_meant(file.process, names):
            tails.setdefault(file.path, log_files.Tail(file))
    found = [entry for tail in tails.values() for entry in log_lines.entries(tail.news(), tail.file.process)]
    return sorted(found, key=lambda entry: entry.unix_s or time.time())


class _Printer:
    """Writes entries to standard output, coloured on a terminal that has colours."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._width = 12

    def show(self, entry: Entry) -> None:
        """Print one, at once."""
        if self._as_json:
            line = log_lines.as_json(entry)
        else:
            self._width = max(self._width, len(entry.process))
            line = log_lines.as_text(entry, self._width)
            if self._coloured and (colour := _COLOURS.get(entry.level)):
                line = typer.style(line, fg=colour)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=_EXAMPLES)(friendly(logs))
