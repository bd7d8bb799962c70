"""The text of a unit: a template beside this file, filled in. Above stands `cli.service.control`; below, nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cli.exits import UsageError

_SIZE = re.compile(r"(\d+[KMGT]?|\d{1,3}%)")
_STOP_MARGIN_S = 45.0  # what the orchestrator, Ray and the janitor may take after the gateways' drain


@dataclass(frozen=True, slots=True)
class Wish:
    """What a unit shall be.

    Args:
        name: of the unit, without `.service`.
        command: what it runs.
        home: of the account that it runs as.
        account: whose; None makes a unit of the user's own manager.
        drain_s: how long the server lets requests finish, in seconds.
        memory_high: systemd size beyond which the kernel slows it down and reclaims; None for no limit.
        memory_max: systemd size beyond which the kernel kills in it; None for no limit.
        environment: variables to set; never secrets, since units are public.
    """

    name: str
    command: tuple[str, ...]
    home: Path
    account: str | None
    drain_s: float
    memory_high: str | None = None
    memory_max: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


def quoted(text: str, *, is_command: bool = True) -> str:
    """Return a word for a unit: systemd's specifiers, variables and quotes mean nothing in it.

    Raises:
        UsageError: it holds a control character, which could begin another setting.
    """
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise UsageError(f"{text!r} has a control character; a unit cannot hold it")
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if is_command:
        text = text.replace("$", "$$")
    return f'"{text}"' if not re.fullmatch(r"[\w@:,.+/=%$-]+", text) else text


def text_of(wish: Wish) -> str:
    """Return the unit's text.

    Raises:
        UsageError: a size, a name or a word that systemd would not take.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}", wish.name):
        raise UsageError(f"{wish.name!r} is no name for a unit; use letters, digits, - and _")
    if re.search(r"[\s\"'\\%$]", str(wish.home)):
        raise UsageError(f"{wish.home} has characters that a unit's paths cannot hold")
    memory = []
    for setting, size in (("MemoryHigh", wish.memory_high), ("MemoryMax", wish.memory_max)):
        if size is not None and not _SIZE.fullmatch(size):
            raise UsageError(f"{size!r} is no size; write it like 24G or 80%")
        if size is not None:
            memory.append(f"{setting}={size}")
    pairs = (f"{key}={value}" for key, value in wish.environment)
    marks = {
        "NAME": wish.name,
        "ACCOUNT": wish.account or "",
        "HOME": str(wish.home),
        "EXEC": " ".join(quoted(word) for word in wish.command),
        "STOP_S": str(round(wish.drain_s + _STOP_MARGIN_S)),
        "MEMORY": "\n".join(memory),
        "ENVIRONMENT": "\n".join(f"Environment={quoted(pair, is_command=False)}" for pair in pairs),
    }
    template = Path(__file__).with_name("system.service.in" if wish.account else "user.service.in")
    lines = []
    for line in template.read_text(encoding="utf-8").splitlines():
        filled = re.sub(r"@([A-Z_]+)@", lambda mark: marks[mark[1]], line)
        if filled or not line:  # a mark that stands for nothing leaves no line
            lines.append(filled)
    return "\n".join(lines) + "\n"
