"""What a configuration file holds + what it must hold → its new text. Pure. Above: `cli.connect`; below: `jsonc`.

Comments, order and everything that is not ours stay. A value of the user's that differs from what is wanted is never
replaced: it is a conflict, told by name, and nothing is written.
"""

from __future__ import annotations

import io
import json
from collections.abc import MutableMapping, MutableSequence, Sequence
from copy import deepcopy
from typing import Any

import yaml

from cli.clients import jsonc
from cli.clients.client import Entry, Format


class Conflict(Exception):
    """The file says otherwise; one line for each value that the user must decide on."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


class Unreadable(Exception):
    """The file cannot be understood, so it cannot be changed safely."""


def merged(text: str, kind: Format, entries: Sequence[Entry]) -> str:
    """Return the file's text with every entry in it; an empty text is a new file.

    Raises:
        Unreadable: it is not what its name says.
        Conflict: values that are not ours differ.
    """
    before = plain(text, kind)
    wanted = apply(deepcopy(before), entries)
    if wanted == before and text:
        return text
    result = _EDITORS[kind](text, entries)
    if plain(result, kind) != wanted:
        raise Unreadable("its form is unusual")
    return result


def plain(text: str, kind: Format) -> Any:
    """Return what a text means as plain data; an empty one is an empty object.

    Raises:
        Unreadable: it is malformed.
    """
    try:
        if kind == "toml":
            import tomllib

            return tomllib.loads(text)
        if kind == "yaml":
            return yaml.safe_load(text) or {}
        return jsonc.read(text).value
    except (ValueError, yaml.YAMLError) as error:
        raise Unreadable(" ".join(str(error).split())) from None


def apply(document: Any, entries: Sequence[Entry]) -> Any:
    """Return the document with every entry put in; it is changed in place where it can be.

    Works on plain data and on the trees of tomlkit and ruamel alike.

    Raises:
        Conflict: values that are not ours differ, or something on the way is of another kind.
    """
    conflicts: list[str] = []
    for entry in entries:
        try:
            document = _put(document, entry)
        except Conflict as conflict:
            conflicts += conflict.lines
    if conflicts:
        raise Conflict(conflicts)
    return document


def _put(document: Any, entry: Entry) -> Any:
    name = ".".join(entry.path) or "the top level"
    if not entry.path:
        items = [] if document == {} else document
        if not isinstance(items, MutableSequence):
            raise Conflict([f"{name} is not a list"])
        _put_item(items, entry)
        return items
    here = document
    for key in entry.path[:-1]:
        if not isinstance(here, MutableMapping):
            raise Conflict([f"{name} cannot be put in: something on the way is not an object"])
        here = here.setdefault(key, {})
    if not isinstance(here, MutableMapping):
        raise Conflict([f"{name} cannot be put in: something on the way is not an object"])
    last = entry.path[-1]
    if entry.item_key:
        items = here.setdefault(last, [])
        if not isinstance(items, MutableSequence):
            raise Conflict([f"{name} is not a list"])
        _put_item(items, entry)
    elif last not in here or entry.is_ours:
        here[last] = deepcopy(entry.value)
    elif entry.value != here[last] and not _is_just_a_name(entry):
        raise Conflict([f"{name} is {here[last]!r}; for hostler it must be {entry.value!r}"])
    return document


def _is_just_a_name(entry: Entry) -> bool:
    """Return whether a value is only needed in a new file, and any other does as well."""
    return entry.path[0] in ("name", "version", "schema", "servers")


def _put_item(items: MutableSequence[Any], entry: Entry) -> None:
    for index, item in enumerate(items):
        if isinstance(item, MutableMapping) and item.get(entry.item_key) == entry.value[entry.item_key]:
            items[index] = deepcopy(entry.value)
            return
    items.append(deepcopy(entry.value))


def _edit_toml(text: str, entries: Sequence[Entry]) -> str:
    import tomlkit

    return tomlkit.dumps(apply(tomlkit.parse(text), entries))


def _edit_yaml(text: str, entries: Sequence[Entry]) -> str:
    from ruamel.yaml import YAML

    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 4096
    editor.indent(mapping=2, sequence=4, offset=2) if "\n  - " in text else None
    written = io.StringIO()
    loaded = editor.load(text)
    editor.dump(apply({} if loaded is None else loaded, entries), written)
    return written.getvalue()


def _edit_json(text: str, entries: Sequence[Entry]) -> str:
    if not text.strip():
        return json.dumps(apply({}, entries), indent=2, ensure_ascii=False) + "\n"
    for entry in entries:
        before = jsonc.read(text).value
        after = apply(deepcopy(before), [entry])
        if after != before:
            # A list is written anew as a whole; only lists in sections of our own are ever changed.
            text = jsonc.put(text, entry.path, _at(after, entry.path))
    return text


def _at(document: Any, path: Sequence[str]) -> Any:
    for key in path:
        document = document[key]
    return document


_EDITORS = {"toml": _edit_toml, "yaml": _edit_yaml, "json": _edit_json}
