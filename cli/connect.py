"""`hostler connect`: the configuration with which a client talks to the server that runs here, shown or written.

Above stands `cli.main`; below, `cli.clients` (what each client wants, as data) and `cli.chat_http` (the server).
Writing shows a diff first, keeps a backup, and never replaces a value of the user's own.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import chat, servers
from cli.clients import catalog, merge, render
from cli.clients.client import Client, ConfigFile
from cli.clients.render import KEY_TO_FILL_IN, NO_KEY, Target
from cli.exits import CliError, UsageError
from cli.seeing import show_json

DEFAULT_CONTEXT_TOKENS = 8192
_PLAIN_KEY = re.compile(r"[\w.~+/=-]+")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for."""

    model: str | None = None
    url: str | None = None
    api_key: str | None = None
    port: int | None = None
    with_key: bool = False


@dataclass(frozen=True, slots=True)
class Planned:
    """One file: where it lies, what it holds now ("" if it is not there), what it is to hold."""

    path: Path
    before: str
    after: str


def listing(as_json: bool) -> None:
    """Show every client that can be connected."""
    if as_json:
        show_json([{"name": c.name, "title": c.title, "kind": c.kind, "speaks": c.speaks} for c in catalog.CLIENTS])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "CLIENT", "KIND", "SPEAKS"):
        table.add_column(title, no_wrap=title != "SPEAKS")
    for client in catalog.CLIENTS:
        table.add_row(client.name, client.title, client.kind, client.speaks)
    console = Console(highlight=False)
    console.print(table)
    console.print("\nhostler connect NAME shows what to do; with --write it does it, where the client has a file.")


def connect(name: str, wish: Wish, *, write: bool, as_json: bool) -> None:
    """Show, or write, the configuration of one client.

    Raises:
        UsageError: no such client, or none of its settings lie in a file.
        CliError: no server answers; a file cannot be changed safely.
    """
    client = catalog.find(name)
    if write and not client.files:
        raise UsageError(f"{client.title} keeps its settings where only itself can write; `hostler connect {name}`")
    target = find_target(wish)
    if as_json:
        show_json(_as_json(client, target))
    elif write:
        _write(client, target)
    else:
        sys.stdout.write(_as_text(client, target))


def find_target(wish: Wish) -> Target:
    """Return the server that is meant, and the model to ask it for.

    Raises:
        CliError: none runs or answers, or it has no such model.
    """
    if wish.url and "://" not in wish.url:
        raise UsageError(f"--url is {wish.url!r}; it should begin with http:// or https://")
    http = chat.connect(wish.url, wish.api_key, wish.port)
    try:
        models = {str(item["id"]): item for item in http.model_objects()}
    finally:
        http.close()
    model = wish.model or _first_that_chats(models)
    if model not in models and not _is_alias(model, wish):
        raise CliError(f"{http.url} serves no model {model!r}; it has {', '.join(models) or 'none'}")
    key = http.api_key
    shown = NO_KEY if not key else key if wish.with_key and _PLAIN_KEY.fullmatch(key) else KEY_TO_FILL_IN
    context = models.get(model, {}).get("max_model_len")
    tokens = context if isinstance(context, int) and context > 0 else DEFAULT_CONTEXT_TOKENS
    return Target(http.url, model, shown, bool(key), tokens)


def _first_that_chats(models: Mapping[str, Any]) -> str:
    """Return the first model that tells no `task`: those that write text have none."""
    for name, described in models.items():
        if not described.get("task"):
            return name
    raise CliError("the server serves no model that chats; name one with --model")


def _is_alias(model: str, wish: Wish) -> bool:
    return not wish.url and model in servers.names_of(servers.find(wish.port).run_dir)


def plan_files(client: Client, target: Target) -> list[Planned]:
    """Return what each file of the client is, and is to be.

    Raises:
        CliError: one cannot be changed safely; says what to do by hand.
    """
    return [_plan(file, client, target) for file in client.files]


def _plan(file: ConfigFile, client: Client, target: Target) -> Planned:
    path = path_of(file)
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{path} cannot be read: {error}") from None
    entries = render.entries_of(file, target)
    try:
        return Planned(path, before, merge.merged("" if file.is_whole else before, file.format, entries))
    except merge.Unreadable as error:
        raise CliError(f"{path} is left as it is, for it cannot be read as {file.format}: {error}") from None
    except merge.Conflict as conflict:
        told = "\n".join(f"  {line}" for line in conflict.lines)
        by_hand = f"change that by hand (`hostler connect {client.name}` shows all of it), then run this again"
        raise CliError(f"{path} is left as it is, for it holds settings of your own:\n{told}\n{by_hand}") from None


def path_of(file: ConfigFile) -> Path:
    """Return where a file lies for this user."""
    return render.path_of(file, os.environ, sys.platform, Path.home())


def _write(client: Client, target: Target) -> None:
    planned = plan_files(client, target)
    for file in planned:
        if file.before == file.after:
            sys.stdout.write(f"{file.path} is already so.\n")
            continue
        sys.stdout.writelines(_diff(file))
        backup = keep(file.path)
        replace(file.path, file.after)
        sys.stdout.write(f"\nWrote {file.path}" + (f"; before: {backup}\n" if backup else "\n"))
    sys.stdout.write("\n" + _what_is_left(client, target))


def _diff(file: Planned) -> list[str]:
    old, new = file.before.splitlines(keepends=True), file.after.splitlines(keepends=True)
    lines = difflib.unified_diff(old, new, str(file.path), str(file.path))
    return [line if line.endswith("\n") else f"{line}\n" for line in lines]


def keep(path: Path) -> Path | None:
    """Copy a file beside itself under a name that is not taken; None if there is none."""
    if not path.exists():
        return None
    stem = f"{path.name}.before-hostler-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        backup = path.with_name(stem if not number else f"{stem}-{number}")
        try:
            descriptor = os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL, path.stat().st_mode & 0o777)
        except FileExistsError:
            continue
        with os.fdopen(descriptor, "wb") as copy:
            copy.write(path.read_bytes())
        return backup
    raise CliError(f"{path}: too many backups beside it")


def replace(path: Path, text: str) -> None:
    """Write a file at once or not at all, through a link if it is one; a new one is for this user alone."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _fresh(file: ConfigFile, target: Target) -> str:
    return merge.merged("", file.format, render.entries_of(file, target))


def _as_text(client: Client, target: Target) -> str:
    lines = [f"{client.title} with {target.model} at {target.base}\n"]
    for file in client.files:
        lines += [
            f"\n# {path_of(file)}",
            " (hostler connect NAME --write puts it there)\n".replace("NAME", client.name),
        ]
        lines.append(_ended(_fresh(file, target)))
    if client.snippet is not None:
        lines.append("\n" + _ended(render.fill(client.snippet.text, target)))
    return "".join(lines) + "\n" + _what_is_left(client, target)


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _what_is_left(client: Client, target: Target) -> str:
    lines = []
    if client.needs_public_url and not target.root.startswith("https://"):
        lines.append(
            f"{client.title}'s requests come from its maker's servers, which cannot reach {target.root}: put the "
            f"server behind a public https address, with a key, then `hostler connect {client.name} --url https://…`."
        )
    if target.has_key and client.key_variable:
        lines.append(f"The key is read from the environment: export {client.key_variable}={target.key}")
    elif target.key == KEY_TO_FILL_IN:
        lines.append(f"Put your key in place of {KEY_TO_FILL_IN}, or use --with-key.")
    lines += [f"  {step.text}" if step.is_command else step.text for step in render.steps_of(client, target)]
    lines.append(f"Does it work? hostler doctor --client {client.name}")
    return "\n".join(lines) + "\n"


def _as_json(client: Client, target: Target) -> dict[str, Any]:
    snippet = client.snippet and {
        "language": client.snippet.language,
        "text": render.fill(client.snippet.text, target),
    }
    return {
        "client": client.name,
        "base_url": target.base,
        "model": target.model,
        "key": target.key,
        "files": [{"path": str(path_of(f)), "format": f.format, "text": _fresh(f, target)} for f in client.files],
        "snippet": snippet,
        "environment": {client.key_variable: target.key} if client.key_variable and target.has_key else {},
        "steps": [step.text for step in render.steps_of(client, target)],
    }
