"""Log lines of every process: a constant message, then its fields; one line each, to stderr.

`HOSTLER_LOG_FORMAT=json` and `HOSTLER_LOG_LEVEL` (which `hostler serve` sets from its flags) choose form and level.
"""

from __future__ import annotations

import json
import logging
import os

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")}


class LineFormatter(logging.Formatter):
    """For people: what was passed as `extra` follows the message as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """Return the line without a traceback."""
        fields = " ".join(f"{key}={value!r}" for key, value in _fields(record).items())
        line = super().formatMessage(record)
        return f"{line} {fields}" if fields else line


class JsonFormatter(logging.Formatter):
    """For machines: one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON; what JSON cannot hold becomes its repr."""
        entry: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=repr, ensure_ascii=False)


def configure() -> None:
    """Send every logger of this process to stderr, as the environment wants it."""
    handler = logging.StreamHandler()
    as_json = os.environ.get("HOSTLER_LOG_FORMAT") == "json"
    handler.setFormatter(JsonFormatter() if as_json else LineFormatter())
    level = logging.getLevelNamesMapping().get(os.environ.get("HOSTLER_LOG_LEVEL", "INFO").upper(), logging.INFO)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
