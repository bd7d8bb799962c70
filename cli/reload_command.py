"""`hostler reload`: asks the server that runs here to read its configuration again, and shows what came of it.

Above stands `cli.main`; below, `cli.servers` and the files that `cli.reloading` answers with. The server itself judges:
only it knows with which flags it was started, from which directory.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from cli import reloading, servers
from cli.exits import CliError, UsageError

_ANSWER_S = 90.0
_EVERY_S = 0.05


def reload(port: int | None, dry_run: bool, as_json: bool) -> None:
    """Reload, or only tell what a reload would do.

    Raises:
        UsageError: the configuration is wrong, or something in it needs a restart; nothing was changed.
        CliError: no server, or it does not answer.
    """
    server = servers.find(port)
    if server.pid is None:
        raise CliError(f"the server on port {server.port} does not say who it is; send SIGHUP to `hostler serve`")
    answer = _ask(server.run_dir.path, server.pid, dry_run)
    if as_json:
        typer.echo(json.dumps(answer))
        if not answer["ok"]:
            raise typer.Exit(UsageError.exit_code)
        return
    if not answer["ok"]:
        raise UsageError("\n".join(answer["faults"]))
    for line in answer["changes"]:
        typer.echo(f"  {line}")
    if not answer["changes"]:
        typer.echo("nothing has changed")
    elif dry_run:
        typer.echo("`hostler reload` does this; running requests finish as they began")
    else:
        typer.echo("reloaded")
        for line in answer["warnings"]:
            typer.echo(f"  ✗ {line}", err=True)


def _ask(directory: Path, pid: int, dry_run: bool) -> dict[str, Any]:
    key = secrets.token_hex(8)
    request, answer = (directory / name.format(key) for name in (reloading.REQUEST, reloading.ANSWER))
    draft = request.with_name(f".{request.name}")
    try:
        draft.write_text(json.dumps({"dry_run": dry_run}), encoding="utf-8")
        draft.replace(request)
        os.kill(pid, reloading.RELOAD_SIGNAL)
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                values: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
                return values
            os.kill(pid, 0)
            time.sleep(_EVERY_S)
    except ProcessLookupError:
        raise CliError("the server has just ended; start it again with `hostler serve`") from None
    finally:
        for path in (draft, request, answer):
            path.unlink(missing_ok=True)
    raise CliError(f"the server (pid {pid}) did not answer within {_ANSWER_S:.0f} s; see what `hostler serve` prints")
