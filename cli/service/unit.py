"""The text of a systemd unit that runs `hostler serve`, from `hostler.service.in`. Pure but for reading the template.

Above stands `cli.service.control`; below, the template beside this file, which says why each setting is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from cli.exits import UsageError

Scope = Literal["user", "system"]
MARK = "# Written by `hostler service install`."
"""How a unit of ours begins; another is never overwritten or removed."""

TEMPLATE = Path(__file__).with_name("hostler.service.in")
_BACKOFF_SINCE = 254
_STOP_MARGIN_S = 45.0
"""What the orchestrator, Ray and the janitor may take after the gateways' drain."""
_SAFE = re.compile(r"[\w@%+=:,./-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
_SIZE = re.compile(r"\d+[KMGT]?|\d{1,3}%")


@dataclass(frozen=True, slots=True)
class Unit:
    """What differs from one installation to the next.

    Args:
        name: without `.service`.
        scope: whose manager runs it: a user's own, or the machine's.
        command: what is run, its program as an absolute path.
        reload: what makes it read its configuration again.
        port: where it serves.
        directory: where relative paths of the command start.
        environment_file: lines of KEY=VALUE; it may be missing.
        drain_s: how long the server lets requests finish, in seconds.
        environment: variables to set; never secrets, since units are public.
        account: of a system unit, whose it runs as.
        writable: of a system unit, further paths that it may write to.
        memory_high, memory_max: systemd's sizes ("24G", "80%"); None: no limit.
        has_gpu: of a system unit, whether it needs devices beyond /dev/null and its like.
        systemd_version: what the manager understands.
    """

    name: str
    scope: Scope
    command: tuple[str, ...]
    reload: tuple[str, ...]
    port: int
    directory: Path
    environment_file: Path
    drain_s: float = 20.0
    environment: tuple[tuple[str, str], ...] = ()
    account: str = ""
    writable: tuple[Path, ...] = ()
    memory_high: str | None = None
    memory_max: str | None = None
    has_gpu: bool = True
    systemd_version: int = 0


def quoted(word: str, *, is_command: bool = True) -> str:
    """Return a word as systemd reads it: no specifier, in a command no variable, one word.

    Raises:
        UsageError: it holds a control character, which could begin another setting.
    """
    _refuse_control(word)
    escaped = word.replace("\\", "\\\\").replace("%", "%%")
    if is_command:
        escaped = escaped.replace("$", "$$")
    if word and _SAFE.fullmatch(word):
        return escaped
    return '"{}"'.format(escaped.replace('"', '\\"'))


def _refuse_control(word: str) -> None:
    if any(ord(character) < 32 or ord(character) == 127 for character in word):
        raise UsageError(f"{word!r} has a control character; a unit cannot hold it")


def _path(path: Path) -> str:
    """Return a path as systemd reads it where one path stands alone."""
    _refuse_control(str(path))
    return str(path).replace("%", "%%")


def _memory(unit: Unit) -> str:
    sizes = (("MemoryHigh", unit.memory_high), ("MemoryMax", unit.memory_max))
    for _, size in sizes:
        if size is not None and not _SIZE.fullmatch(size):
            raise UsageError(f"{size!r} is no size; write it like 24G or 80%")
    return "\n".join(f"{setting}={size}" for setting, size in sizes if size is not None)


def text(unit: Unit) -> str:
    """Return the unit file.

    Raises:
        UsageError: a size, a name or a word that systemd would not take.
    """
    if not _NAME.fullmatch(unit.name):
        raise UsageError(f"{unit.name!r} is no name for a unit; use letters, digits, - and _")
    pairs = (f"{key}={value}" for key, value in unit.environment)
    writable = " ".join(quoted(f"-{path}", is_command=False) for path in unit.writable)
    values = {
        "name": unit.name,
        "user_flag": " --user" if unit.scope == "user" else "",
        "port": str(unit.port),
        "account": unit.account,
        "directory": _path(unit.directory),
        "environment_file": _path(unit.environment_file),
        "command": " ".join(map(quoted, unit.command)),
        "reload": " ".join(map(quoted, unit.reload)),
        "backoff": "RestartSteps=6\nRestartMaxDelaySec=60" if unit.systemd_version >= _BACKOFF_SINCE else "",
        "memory": _memory(unit),
        "stop_s": str(round(unit.drain_s + _STOP_MARGIN_S)),
        "environment": "\n".join(f"Environment={quoted(pair, is_command=False)}" for pair in pairs),
        "writable": f"ReadWritePaths={writable}" if writable else "",
        "no_gpu": "no" if unit.has_gpu else "yes",
    }
    kept: list[str] = []
    for line in TEMPLATE.read_text(encoding="utf-8").splitlines():
        scope, bar, rest = line.partition("|")
        if bar and scope in ("user", "system"):
            if scope != unit.scope:
                continue
            line = rest.removeprefix(" ")
        filled = Template(line).substitute(values)
        if filled or not line:  # a line that only held something optional leaves no gap
            kept.append(filled)
    return "\n".join(kept) + "\n"
