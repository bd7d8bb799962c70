"""`hostler service status`: what systemd knows of the service, as JSON or in a few lines.

Above stands `cli.service_commands`; below, `cli.service.systemd`.
"""

from __future__ import annotations

import getpass
import re
from typing import Any

import typer
from hostler.words import size

from cli.seeing import show_json
from cli.service import systemd
from cli.service.unit import Scope

_KEYS = (
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "UnitFileState",
    "MainPID",
    "NRestarts",
    "StatusText",
    "MemoryCurrent",
    "MemoryMax",
    "FragmentPath",
    "ExecStart",
    "StateChangeTimestamp",
)
_PORT = re.compile(r"--port[ =](\d+)|-p (\d+)")


def show(scope: Scope, name: str, as_json: bool) -> None:
    """Show it.

    Raises:
        CliError: no systemd, or no such unit.
        typer.Exit: code 1 if it does not run.
    """
    systemd.require(scope)
    systemd.require_installed(scope, name)
    values = read(scope, name)
    if as_json:
        show_json(values)
    else:
        for line in lines(values):
            typer.echo(line)
    if values["state"] not in ("active", "reloading"):
        raise typer.Exit(1)


def read(scope: Scope, name: str) -> dict[str, Any]:
    """Return the service's state as plain values; memory in bytes, None where it is not counted or not limited."""
    found = systemd.properties(scope, name, *_KEYS)
    port = _PORT.search(found.get("ExecStart", ""))
    return {
        "unit": f"{name}.service",
        "scope": scope,
        "state": found.get("ActiveState", "unknown"),
        "substate": found.get("SubState", ""),
        "result": found.get("Result", ""),
        "since": found.get("StateChangeTimestamp") or None,
        "says": (found.get("StatusText") or None) if found.get("MainPID", "0") != "0" else None,
        "pid": int(found.get("MainPID") or 0) or None,
        "port": int(port[1] or port[2]) if port else None,
        "num_restarts": int(found.get("NRestarts") or 0),
        "memory_bytes": _number(found.get("MemoryCurrent")),
        "memory_max_bytes": _number(found.get("MemoryMax")),
        "starts_by_itself": found.get("UnitFileState") == "enabled",
        "outlives_login": scope == "system" or systemd.lingers(getpass.getuser()),
        "file": found.get("FragmentPath") or None,
    }


def _number(text: str | None) -> int | None:
    number = int(text) if text and text.isdigit() else None
    return None if number is None or number >= 2**63 else number  # systemd's word for "none" is the largest number


def lines(values: dict[str, Any]) -> list[str]:
    """Return what people see."""
    since = f" since {values['since']}" if values["since"] else ""
    why = f", {values['result']}" if values["result"] not in ("", "success") else ""
    shown = [f"{values['unit']}  {values['state']} ({values['substate']}{why}){since}"]
    if values["says"]:
        shown.append(f"  {values['says']}")
    parts = [f"pid {values['pid']}"] if values["pid"] else []
    parts += [f"port {values['port']}"] if values["port"] else []
    if values["memory_bytes"] is not None:
        most = f" of {size(values['memory_max_bytes'])}" if values["memory_max_bytes"] else ""
        parts.append(f"memory {size(values['memory_bytes'])}{most}")
    parts.append(f"restarts {values['num_restarts']}")
    shown.append(f"  {'  '.join(parts)}")
    if not values["starts_by_itself"]:
        shown.append("  it does not start by itself; `hostler service install` changes that")
    elif not values["outlives_login"]:
        shown.append("  it ends when you log out; `hostler service install --linger` changes that")
    shown.append(f"  {values['file']}")
    return shown
