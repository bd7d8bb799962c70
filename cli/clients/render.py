"""A client's entry and a server → what to write, paste and do. Pure. Above: `cli.connect`; below: `client`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.clients.client import Client, ConfigFile, Entry, Step, When

NO_KEY = "unused"
"""What stands for the key where a client wants one and the server does not."""
KEY_TO_FILL_IN = "YOUR_KEY"
_CONTEXT = "@CONTEXT@"


@dataclass(frozen=True, slots=True)
class Target:
    """The server that a client is to talk to.

    Attributes:
        root: its address without a slash at the end and without /v1.
        key: as it is to be shown; `NO_KEY`, `KEY_TO_FILL_IN`, or the key itself.
        has_key: the server demands one.
        context_tokens: of the model, prompt and reply together.
    """

    root: str
    model: str
    key: str
    has_key: bool
    context_tokens: int

    @property
    def base(self) -> str:
        """The address that OpenAI's clients call their base URL."""
        return f"{self.root}/v1"

    def marks(self) -> dict[str, str]:
        """Return what each mark in a text stands for."""
        return {
            "@ROOT@": self.root,
            "@BASE@": self.base,
            "@MODEL@": self.model,
            "@KEY@": self.key,
            _CONTEXT: str(self.context_tokens),
        }


def applies(when: When, target: Target) -> bool:
    """Return whether something holds for a server with, or without, a key."""
    return not when or (when == "key") is target.has_key


def fill(value: Any, target: Target) -> Any:
    """Return plain data with every mark filled; a lone @CONTEXT@ becomes a number."""
    if value == _CONTEXT:
        return target.context_tokens
    if isinstance(value, str):
        for mark, text in target.marks().items():
            value = value.replace(mark, text)
        return value
    if isinstance(value, Mapping):
        return {fill(key, target): fill(item, target) for key, item in value.items()}
    return [fill(item, target) for item in value] if isinstance(value, list) else value


def entries_of(file: ConfigFile, target: Target) -> list[Entry]:
    """Return the entries that a file must hold for this server, filled."""
    return [
        Entry(tuple(fill(list(e.path), target)), fill(e.value, target), e.item_key, e.is_ours)
        for e in file.entries
        if applies(e.when, target)
    ]


def steps_of(client: Client, target: Target) -> list[Step]:
    """Return what is left to do by hand, filled."""
    return [Step(fill(s.text, target), s.is_command) for s in client.steps if applies(s.when, target)]


def path_of(file: ConfigFile, environ: Mapping[str, str], platform: str, home: Path) -> Path:
    """Return where a file lies for this user; of several names the one that is there."""
    if file.directory_variable and (moved := environ.get(file.directory_variable)):
        directory = Path(moved) / file.under
    elif file.mac_directory and platform == "darwin":
        directory = _expanded(file.mac_directory, home)
    else:
        directory = _expanded(file.directory, home)
    there = [directory / name for name in file.alternatives if (directory / name).exists()]
    return there[0] if there else directory / file.name


def _expanded(directory: str, home: Path) -> Path:
    return home / directory[2:] if directory.startswith("~/") else home if directory == "~" else Path(directory)
