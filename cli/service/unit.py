"""The text of a systemd unit that runs `hostler serve`, from `hostler.service.in`. Pure but for reading the template.

Above stands `cli.service.actions`; below, the template beside this file, which says why each setting is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

Scope = Literal["user", "system"]
MARK = "# Written by `hostler service install`."
"""How a unit of ours begins; another is never overwritten or removed."""

TEMPLATE = Path(__file__).with_name("hostler.service.in")
_BACKOFF_SINCE = 254
_SAFE = re.compile(r"[\w@%+=:,./-]+")


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
        run_as: of a system unit, the user that runs it.
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
    run_as: str = ""
    writable: tuple[Path, ...] = ()
    memory_high: str | None = None
    memory_max: str | None = None
    has_gpu: bool = True
    systemd_version: int = 0


def quoted(word: str) -> str:
    """Return a word as systemd reads it in a command: no specifier, no variable, one word."""
    escaped = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$")
    if word and _SAFE.fullmatch(word):
        return escaped
    inner = escaped.replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{inner}"'


def _path(path: Path) -> str:
    """Return a path as systemd reads it where one path stands alone."""
    return str(path).replace("%", "%%")


def _listed(path: Path) -> str:
    """Return a path as systemd reads it in a list: quoted, and no fault if it is missing."""
    return '"-{}"'.format(_path(path).replace("\\", "\\\\").replace('"', '\\"'))


def text(unit: Unit) -> str:
    """Return the unit file."""
    memory = [
        f"{key}={value}"
        for key, value in (("MemoryHigh", unit.memory_high), ("MemoryMax", unit.memory_max))
        if value is not None
    ]
    values = {
        "name": unit.name,
        "user_flag": " --user" if unit.scope == "user" else "",
        "port": str(unit.port),
        "run_as": unit.run_as,
        "directory": _path(unit.directory),
        "environment_file": _path(unit.environment_file),
        "command": " ".join(map(quoted, unit.command)),
        "reload": " ".join(map(quoted, unit.reload)),
        "backoff": "RestartSteps=6\nRestartMaxDelaySec=60" if unit.systemd_version >= _BACKOFF_SINCE else "",
        "memory": "\n".join(memory),
        "writable": "ReadWritePaths=" + " ".join(map(_listed, unit.writable)) if unit.writable else "",
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
