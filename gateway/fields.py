"""Typed, bounded reading of client JSON. Above: the dialects' request parsers; below: nothing.

Plain functions over plain dicts instead of pydantic models: a 4 MB body is checked in a few milliseconds on the event
loop, `null` means absent everywhere, unknown fields cost nothing, and every message names the field as the client
wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from hostler.errors import InvalidRequest, UnsupportedParameter

MAX_MODEL_CHARS = 256

_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a decimal"),
    (str, "a string"),
    (list, "an array"),
    (dict, "an object"),
)


def kind_of(value: object) -> str:
    """Return the JSON kind of a value, in words."""
    return next((words for kind, words in _KINDS if isinstance(value, kind)), "null")


def show(value: object) -> str:
    """Return a value for an error message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def wrong_type(name: str, expected: str, value: object) -> InvalidRequest:
    """Return the error for a field of the wrong JSON kind."""
    return InvalidRequest(
        f"Invalid type for '{name}': expected {expected}, but got {kind_of(value)} instead.", param=name
    )


def dump_json(value: object, name: str) -> str:
    """Return client JSON as text again, key order kept.

    Raises:
        InvalidRequest: it is nested too deeply to be written.
    """
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        raise InvalidRequest(f"Invalid '{name}': nested too deeply.", param=name) from None


class Fields:
    """Reader of one JSON object. Every getter returns None for an absent or null field.

    Args:
        values: the object.
        path: its own name, put before each field's name in messages ("messages[3]").
    """

    __slots__ = ("_path", "_values")

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    @property
    def name(self) -> str:
        """The object's own full name."""
        return self._path

    def name_of(self, field: str) -> str:
        """Return a field's full name, as error messages and `param` use it."""
        return f"{self._path}.{field}" if self._path else field

    def raw(self, field: str) -> Any:
        """Return the value as it is."""
        return self._values.get(field)

    def boolean(self, field: str) -> bool | None:
        """Return a true or false."""
        value = self._values.get(field)
        if value is not None and not isinstance(value, bool):
            raise wrong_type(self.name_of(field), "a boolean", value)
        return value

    def number(self, field: str, low: float, high: float) -> float | None:
        """Return a number within low … high, both included."""
        value = self._values.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(self.name_of(field), "a decimal", value)
        self._check_bounds(field, value, low, high, "decimal")
        return float(value)

    def integer(self, field: str, low: int, high: int) -> int | None:
        """Return a whole number within low … high, both included; 3.0 counts as 3."""
        value = self._values.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise wrong_type(self.name_of(field), "an integer", value)
        self._check_bounds(field, value, low, high, "integer")
        return int(value)

    def _check_bounds(self, field: str, value: float, low: float, high: float, kind: str) -> None:
        name = self.name_of(field)
        if value < low:
            raise InvalidRequest(
                f"Invalid '{name}': {kind} below minimum value. Expected >= {low}, but got {show(value)} instead.",
                param=name,
            )
        if not value <= high:
            raise InvalidRequest(
                f"Invalid '{name}': {kind} above maximum value. Expected <= {high}, but got {show(value)} instead.",
                param=name,
            )

    def string(self, field: str, max_chars: int) -> str | None:
        """Return a string of at most `max_chars` characters."""
        value = self._values.get(field)
        if value is None:
            return None
        name = self.name_of(field)
        if not isinstance(value, str):
            raise wrong_type(name, "a string", value)
        if len(value) > max_chars:
            raise InvalidRequest(
                f"Invalid '{name}': string too long. Expected at most {max_chars} characters, but got {len(value)}.",
                param=name,
            )
        return value

    def choice(self, field: str, allowed: Sequence[str]) -> str | None:
        """Return a string that is one of `allowed`."""
        value = self.string(field, 256)
        if value is not None and value not in allowed:
            names = ", ".join(f"'{item}'" for item in allowed)
            raise InvalidRequest(
                f"Invalid value: {show(value)}. Supported values are: {names}.", param=self.name_of(field)
            )
        return value

    def array(self, field: str, max_items: int) -> list[Any] | None:
        """Return an array of at most `max_items`."""
        value = self._values.get(field)
        if value is None:
            return None
        name = self.name_of(field)
        if not isinstance(value, list):
            raise wrong_type(name, "an array", value)
        if len(value) > max_items:
            raise InvalidRequest(
                f"Invalid '{name}': array too long. Expected at most {max_items} items, but got {len(value)}.",
                param=name,
            )
        return value

    def object(self, field: str) -> dict[str, Any] | None:
        """Return an object."""
        value = self._values.get(field)
        if value is not None and not isinstance(value, dict):
            raise wrong_type(self.name_of(field), "an object", value)
        return value

    def child(self, field: str) -> Fields | None:
        """Return a reader of a nested object."""
        value = self.object(field)
        return None if value is None else Fields(value, self.name_of(field))

    def required_child(self, field: str) -> Fields:
        """Return a reader of a nested object that must be there."""
        child = self.child(field)
        if child is None:
            raise self.missing(field)
        return child

    def children(self, field: str, max_items: int) -> list[Fields]:
        """Return readers of an array of objects; empty when absent."""
        items = self.array(field, max_items) or []
        name = self.name_of(field)
        readers = []
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise wrong_type(f"{name}[{index}]", "an object", item)
            readers.append(Fields(item, f"{name}[{index}]"))
        return readers

    def model(self) -> str:
        """Return the name in `model`, which every request must have."""
        name = self.string("model", MAX_MODEL_CHARS)
        if not name:
            raise InvalidRequest("You must provide a model parameter.", param="model")
        return name

    def refuse(self, refused: Mapping[str, Sequence[Any]]) -> None:
        """Refuse fields that would change the answer and that we cannot do.

        Args:
            refused: their names, each with the values that change nothing and may stand.

        Raises:
            UnsupportedParameter: one has another value.
        """
        for field, harmless in refused.items():
            value = self._values.get(field)
            if value is not None and value not in harmless:
                name = self.name_of(field)
                raise UnsupportedParameter(f"'{name}' is not supported. Remove it from the request.", param=name)

    def missing(self, field: str) -> InvalidRequest:
        """Return the error for a required field that is absent."""
        name = self.name_of(field)
        return InvalidRequest(f"Missing required parameter: '{name}'.", param=name)
