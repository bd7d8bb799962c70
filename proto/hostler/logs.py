"""Log lines of every process: a constant message, then its fields; one line each, to stderr.

`HOSTLER_LOG_FORMAT=json` and `HOSTLER_LOG_LEVEL` (which `hostler serve` sets from its flags) choose form and level.
Nobody logs secrets on purpose; `redacted` is the last net, over whole lines with their fields and tracebacks.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

HIDDEN = "[hidden]"
_SECRET_VARIABLES = (
    "HOSTLER_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "NGROK_AUTHTOKEN",
    "RAY_AUTH_TOKEN",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
)
_MIN_SECRET_LENGTH = 8
"""Shorter values are words that occur elsewhere; hiding them would only blur the log."""
_LOOKS_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:hk[_-][\w-]{16,}|hf_[A-Za-z0-9]{20,}|sk-[\w-]{16,})"
    r"|(?i:(?<=bearer )[\w.~+/=-]{8,})"
    r"|(?i:(?<=x-api-key: )[^\s'\",\\]+)"
    r"|(?<=://)[^\s/@:'\"\\]*:[^\s/@'\"\\]+(?=@)",
    re.ASCII,
)


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the secrets that an environment holds, the longest first."""
    values = {environ.get(name, "") for name in _SECRET_VARIABLES}
    return tuple(sorted((value for value in values if len(value) >= _MIN_SECRET_LENGTH), key=len, reverse=True))


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text without `secrets`, and without what looks like a key, a token or a password in a URL."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _LOOKS_SECRET.sub(HIDDEN, text)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")}


class LineFormatter(logging.Formatter):
    """For people: what was passed as `extra` follows the message as key=value."""

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """Return the line and its traceback, without secrets."""
        return redacted(super().format(record), self._secrets)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """Return the line without a traceback."""
        fields = " ".join(f"{key}={value!r}" for key, value in _fields(record).items())
        line = super().formatMessage(record)
        return f"{line} {fields}" if fields else line


class JsonFormatter(logging.Formatter):
    """For machines: one JSON object a line."""

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON without secrets; what JSON cannot hold becomes its repr."""
        entry: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return redacted(json.dumps(entry, default=repr, ensure_ascii=False), self._secrets)


def configure() -> None:
    """Send every logger of this process to stderr, as the environment wants it."""
    handler = logging.StreamHandler()
    as_json = os.environ.get("HOSTLER_LOG_FORMAT") == "json"
    secrets = secrets_of(os.environ)
    handler.setFormatter(JsonFormatter(secrets) if as_json else LineFormatter(secrets))
    level = logging.getLevelNamesMapping().get(os.environ.get("HOSTLER_LOG_LEVEL", "INFO").upper(), logging.INFO)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
