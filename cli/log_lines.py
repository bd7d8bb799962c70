"""Entries of our processes' logs: reading both of their forms, choosing, showing. Pure.

Above stands `cli.log_files`; below, what `hostler.logs` writes. What is no line of ours (a traceback, what a library
prints) belongs to the entry before it.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ([A-Z]+) (\S+) (.*)")
_VALUE = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\[({][^\])}]*[\])}]|\S+"""
_FIELDS = re.compile(rf"^(.*?)((?: \w+=(?:{_VALUE}))+)$")
_FIELD = re.compile(rf" (\w+)=({_VALUE})")
_AGO = re.compile(r"(\d+(?:\.\d+)?)(s|m|min|h|d)")
_UNIT_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MAX_MORE = 500
"""Lines kept of one entry: what a library prints without end must not fill our memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of one process's log.

    Attributes:
        unix_s: when it was written; of a file that begins with something else, 0.
        more: the lines that follow it.
    """

    unix_s: float
    process: str
    level: str
    logger: str
    message: str
    fields: dict[str, Any] = field(default_factory=dict)
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What to show.

    Attributes:
        since_unix_s: nothing before.
        level_number: nothing below, as `logging` counts; what has no level counts as INFO.
        request_id: only entries that name it; empty: all.
    """

    since_unix_s: float = 0.0
    level_number: int = 0
    request_id: str = ""

    def takes(self, entry: Entry) -> bool:
        """Tell whether to show an entry."""
        if entry.unix_s < self.since_unix_s:
            return False
        if logging.getLevelNamesMapping().get(entry.level, logging.INFO) < self.level_number:
            return False
        return not self.request_id or self._names_it(entry)

    def _names_it(self, entry: Entry) -> bool:
        if any(value == self.request_id for value in entry.fields.values()):
            return True
        whole = re.compile(rf"(?<![\w-]){re.escape(self.request_id)}(?![\w-])")
        return any(whole.search(text) for text in (entry.message, *entry.more))


def read_since(text: str, now_unix_s: float) -> float:
    """Return the moment that `10m`, `2h`, `1d`, or a time of day or date with it means.

    Raises:
        ValueError: it means none.
    """
    if (ago := _AGO.fullmatch(text.strip())) is not None:
        return now_unix_s - float(ago[1]) * _UNIT_S[ago[2]]
    with suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    today = datetime.fromtimestamp(now_unix_s).date().isoformat()
    return datetime.fromisoformat(f"{today} {text.strip()}").timestamp()


def parse(line: str, process: str) -> Entry | None:
    """Return the entry that a line begins; None if it begins none."""
    if line.startswith("{"):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            values = json.loads(line)
            unix_s = _unix_s(values.pop("time"))
            level, logger, message = (str(values.pop(key)) for key in ("level", "logger", "message"))
            more = tuple(str(values.pop("exception", "")).splitlines())
            return Entry(unix_s, process, level, logger, message, values, more)
        return None
    if (found := _LINE.fullmatch(line)) is None:
        return None
    message, fields = found[4], {}
    if (parts := _FIELDS.match(message)) is not None:
        message, fields = parts[1], {key: _value(text) for key, text in _FIELD.findall(parts[2])}
    try:
        return Entry(_unix_s(found[1]), process, found[2], found[3], message, fields)
    except ValueError:
        return None


def _unix_s(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f").timestamp()


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def entries(lines: Iterable[str], process: str) -> Iterator[Entry]:
    """Yield the entries of one process in the order of their lines, no time before the one before it."""
    now: Entry | None = None
    more: list[str] = []
    for line in lines:
        if (begun := parse(line, process)) is not None:
            if now is not None:
                yield replace(now, more=(*now.more, *more))
                begun = replace(begun, unix_s=max(begun.unix_s, now.unix_s))
            now, more = begun, []
        elif not line.strip():
            continue
        elif now is None:
            now = Entry(0.0, process, "", "", line)
        elif len(more) < _MAX_MORE:
            more.append(line)
    if now is not None:
        yield replace(now, more=(*now.more, *more))


def as_json(entry: Entry) -> str:
    """Return an entry as one line of JSON."""
    values: dict[str, Any] = {"time": entry.unix_s, "process": entry.process, "level": entry.level}
    values |= {"logger": entry.logger, "message": entry.message, **entry.fields}
    if entry.more:
        values["more"] = list(entry.more)
    return json.dumps(values, ensure_ascii=False, default=repr)


def as_text(entry: Entry, width: int) -> str:
    """Return an entry for people: time, level, process in `width` columns, message, fields; then what follows."""
    if entry.unix_s:
        moment = time.strftime("%m-%d %H:%M:%S", time.localtime(entry.unix_s)) + f".{int(entry.unix_s % 1 * 1000):03}"
    else:
        moment = "-" * 18
    fields = "".join(f" {key}={_shown(value)}" for key, value in entry.fields.items())
    head = f"{moment} {entry.level:<7} {entry.process:<{width}} {entry.message}{fields}"
    return "\n".join([_harmless(head.replace("\n", "\\n")), *(f"    {_harmless(line)}" for line in entry.more)])


def _harmless(line: str) -> str:
    """Return a line without what a terminal would obey: strangers' paths and libraries' colours are in logs."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", _COLOUR.sub("", line))


def _shown(value: Any) -> str:
    text = str(value)
    return repr(value) if " " in text or not text else text
