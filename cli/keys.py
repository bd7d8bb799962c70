"""What `hostler key` does. Above: `cli.key_commands`; below: `hostler.keys`, and `cli.settings` for where they lie."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer
from hostler import config as configuration
from hostler.keys import Key, KeyFile, KeysError

from cli.exits import CliError, UsageError
from cli.settings import find_file, keys_path

_SCOPES = ("infer", "admin")
_TAKEN = "Servers that run with this key file take it within a second."


def create(
    name: str,
    *,
    scopes: list[str] | None,
    models: list[str] | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    max_streams: int | None,
    expires: str | None,
    as_json: bool,
    config: Path | None,
) -> None:
    """Make a key and print its text.

    Raises:
        CliError: a value is wrong, the name is taken, or the file cannot be used.
    """
    if wrong := [scope for scope in scopes or () if scope not in _SCOPES]:
        raise UsageError(f"{wrong[0]!r} is not a scope; give infer, admin or both")
    try:
        key, text = _file(config).add(
            name,
            scopes=scopes or ("infer",),  # type: ignore[arg-type]
            models=models,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_streams=max_streams,
            lifetime_s=_seconds(expires),
        )
    except KeysError as error:
        raise CliError(str(error)) from None
    if as_json:
        typer.echo(json.dumps({"key": text, **_plain(key)}))
        return
    typer.echo(text)
    typer.echo(
        f"Key {name!r} ({key.id}) is shown only now. {_TAKEN}\n"
        "Clients send it as their API key; hostler's own commands read it from $HOSTLER_API_KEY.",
        err=True,
    )


def show(as_json: bool, config: Path | None) -> None:
    """Print the keys.

    Raises:
        CliError: the file cannot be used.
    """
    file = _file(config)
    try:
        keys = file.read()
    except KeysError as error:
        raise CliError(str(error)) from None
    if as_json:
        typer.echo(json.dumps([_plain(key) for key in keys]))
        return
    if not keys:
        typer.echo("No keys. Make one: hostler key create laptop", err=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "name", "scopes", "models", "limits", "made", "expires", box=None, pad_edge=False)
    for key in keys:
        made = time.strftime("%Y-%m-%d", time.localtime(key.created_at))
        table.add_row(
            key.id, key.name, " ".join(key.scopes), " ".join(key.models or ("all",)), _limits(key), made, _expiry(key)
        )
    Console().print(table)


def revoke(name: str, as_json: bool, config: Path | None) -> None:
    """Take a key back.

    Raises:
        CliError: there is no such key, or the file cannot be used.
    """
    try:
        key = _file(config).revoke(name)
    except KeysError as error:
        raise CliError(str(error)) from None
    if as_json:
        typer.echo(json.dumps({"revoked": key.id, "name": key.name}))
        return
    typer.echo(f"Revoked {key.name!r} ({key.id}). {_TAKEN.removesuffix('.')}, and end what it has running.")


def _file(config: Path | None) -> KeyFile:
    path = find_file(config)
    return KeyFile(keys_path(configuration.load(path), path))


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = configuration.parse_seconds(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 10**9:
        raise UsageError(f"--expires {text!r} is not a time from now; write it like 12h or 30d")
    return float(seconds)


def _plain(key: Key) -> dict[str, Any]:
    """Return a key's values for scripts; its hash is nobody's business."""
    return key.model_dump(exclude={"digest"})


def _limits(key: Key) -> str:
    limits = (
        (key.requests_per_minute, "requests/min"),
        (key.tokens_per_minute, "tokens/min"),
        (key.max_streams, "at a time"),
    )
    return ", ".join(f"{number} {what}" for number, what in limits if number is not None) or "none"


def _expiry(key: Key) -> str:
    if key.expires_at is None:
        return "never"
    if not key.lives(time.time()):
        return "expired"
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(key.expires_at))
