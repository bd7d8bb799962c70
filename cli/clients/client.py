"""The shape of a client's entry in the catalog. Above: the catalog's files, `render`, `merge`; below: nothing.

Texts hold marks that `render` fills: @ROOT@ (the server), @BASE@ (its /v1), @MODEL@, @KEY@, @CONTEXT@ (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["json", "toml", "yaml"]
When = Literal["", "key", "no key"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One value that a configuration file must hold.

    Attributes:
        path: keys from the top to it; empty for the top itself.
        value: plain data; marks in its strings are filled.
        item_key: the value is one item of the list at `path`, known by this key of it.
        is_ours: nobody else writes there, so what it held before may be replaced.
        when: only for servers that demand a key, or only for those that do not.
    """

    path: tuple[str, ...]
    value: Any
    item_key: str = ""
    is_ours: bool = True
    when: When = ""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A file that the client reads.

    Attributes:
        directory: where it lies, `~` for home.
        directory_variable: environment variable that moves the directory; with `under` what is put below it.
        mac_directory: where it lies on macOS, if elsewhere.
        alternatives: other names that the client reads as well; if one is there, it is the one to change.
        is_whole: the whole file is ours, so `--write` replaces it.
    """

    name: str
    format: Format
    entries: tuple[Entry, ...]
    directory: str
    directory_variable: str = ""
    under: str = ""
    mac_directory: str = ""
    alternatives: tuple[str, ...] = ()
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Snippet:
    """A few lines to paste."""

    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do by hand: a sentence, or a command to type."""

    text: str
    is_command: bool = False
    when: When = ""


@dataclass(frozen=True, slots=True)
class Client:
    """One client.

    Attributes:
        name: what `hostler connect` is told.
        speaks: the paths of the API that it calls.
        key_variable: it reads the key from this environment variable, so no file needs to hold it.
        needs_public_url: its requests come from its maker's servers, not from this machine.
    """

    name: str
    title: str
    kind: Literal["app", "editor", "agent", "library", "shell"]
    speaks: str
    files: tuple[ConfigFile, ...] = ()
    snippet: Snippet | None = None
    steps: tuple[Step, ...] = ()
    key_variable: str = ""
    needs_public_url: bool = False
