"""On what terms a request is served: `keep_alive` and `service_tier`. Above: the dialects; below: `fields`.

`keep_alive` is Ollama's: how long the model is to stay up once idle after this request, as a number of seconds or a
duration as Go writes it ("5m", "1h30m", "500ms"); 0 lets it go at once, a negative one keeps it for ever.
`service_tier` is OpenAI's: `flex` marks work that may wait behind requests that people wait for.
"""

from __future__ import annotations

import math
import re
from typing import Any

from hostler.errors import InvalidRequest

from gateway.fields import Fields, show, wrong_type

MAX_KEEP_ALIVE_S = 10**8
FOREVER_MS = -1
_TIERS = ("auto", "default", "flex", "priority", "scale", "fast", "ultrafast", "standard_only")
_MS_OF_UNIT = {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4, "h": 3.6e6, "d": 8.64e7}
_NUMBER = r"\d{1,18}(?:\.\d{0,18})?|\.\d{1,18}"
_PLAIN = re.compile(rf"([+-]?)({_NUMBER})", re.ASCII)
_STEP = rf"({_NUMBER})(ns|us|µs|ms|s|m|h|d)"
_DURATION = re.compile(rf"([+-]?)((?:{_STEP}){{1,8}})", re.ASCII)


def read_keep_alive_ms(fields: Fields) -> int | None:
    """Return `keep_alive` in milliseconds; None if absent, `FOREVER_MS` for any negative one.

    Raises:
        InvalidRequest: it is no duration, or longer than three years.
    """
    value: Any = fields.raw("keep_alive")
    if value is None:
        return None
    name = fields.name_of("keep_alive")
    if isinstance(value, str):
        milliseconds = _parse(value.strip())
        if milliseconds is None:
            raise InvalidRequest(
                f"Invalid '{name}': {show(value)} is not a duration. Write it like '5m', '1h30m', 300 (seconds), "
                "0 (let the model go at once) or -1 (keep it).",
                param=name,
            )
    elif isinstance(value, int | float) and not isinstance(value, bool):
        milliseconds = max(-1, min(value, MAX_KEEP_ALIVE_S + 1)) * 1e3
    else:
        raise wrong_type(name, "a duration in seconds or a string like '5m'", value)
    if milliseconds < 0:
        return FOREVER_MS
    if milliseconds > MAX_KEEP_ALIVE_S * 1e3:
        raise InvalidRequest(
            f"Invalid '{name}': longer than {MAX_KEEP_ALIVE_S} seconds. -1 keeps the model for ever.", param=name
        )
    return math.ceil(milliseconds)


def _parse(text: str) -> float | None:
    if (plain := _PLAIN.fullmatch(text)) is not None:
        sign, milliseconds = plain[1], float(plain[2]) * 1e3
    elif (written := _DURATION.fullmatch(text)) is not None:
        steps = re.findall(_STEP, written[2], re.ASCII)
        sign, milliseconds = written[1], sum(float(number) * _MS_OF_UNIT[unit] for number, unit in steps)
    else:
        return None
    return -milliseconds if sign == "-" else milliseconds


def read_batch(fields: Fields) -> bool:
    """Return whether `service_tier` marks the request as work that may wait.

    Raises:
        InvalidRequest: a tier that nobody knows.
    """
    return fields.choice("service_tier", _TIERS) == "flex"
