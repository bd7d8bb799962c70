"""JSON Schemas as clients send them: bounded, checked, made ready for a grammar. Pure.

Above: `reply.py` and the tool formats. Below: nothing. What a grammar cannot promise is refused by name (its compiler
does), never dropped; a `$ref` is followed inside the schema only and never fetched.
"""

from __future__ import annotations

import json
from typing import Any

from hostler.errors import InvalidRequest

MAX_SCHEMA_CHARS = 256 * 1024
MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_PROPERTIES = 1000
# At any place at most one space, or one line break with its indentation: a hot sampler cannot pad for ever.
WHITESPACE = r"( |\n {0,32})?"


def read_schema(text: str, param: str) -> dict[str, Any] | bool:
    """Return a schema from JSON text.

    Raises:
        InvalidRequest: not JSON, no schema, too large or too deep; names `param`.
    """
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(f"The schema in '{param}' is longer than {MAX_SCHEMA_CHARS} characters.", param=param)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"The schema in '{param}' is not valid JSON.", param=param) from None
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"The schema in '{param}' must be an object.", param=param)
    check_schema(schema, param)
    return schema


def check_schema(schema: object, param: str) -> None:
    """Refuse a schema beyond the bounds, or with a reference that leads outside it."""
    nodes = 0
    level: list[object] = [schema]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for node in level:
            if isinstance(node, dict):
                _check_object(node, param)
                below.extend(node.values())
            elif isinstance(node, list):
                below.extend(node)
        nodes += len(below)
        if nodes > MAX_NODES:
            raise InvalidRequest(f"The schema in '{param}' has more than {MAX_NODES} parts. Simplify it.", param=param)
        if not below:
            return
        level = below
    raise InvalidRequest(f"The schema in '{param}' is nested deeper than {MAX_DEPTH} levels.", param=param)


def _check_object(node: dict[str, Any], param: str) -> None:
    reference = node.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise InvalidRequest(
            f"The schema in '{param}' refers to {reference[:100]!r}; only references inside it ('#…') are followed.",
            param=param,
        )
    properties = node.get("properties")
    if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
        raise InvalidRequest(
            f"An object of the schema in '{param}' has {len(properties)} properties; at most {MAX_PROPERTIES} are "
            "taken.",
            param=param,
        )


def for_grammar(schema: dict[str, Any] | bool, *, compact: bool = False, lenient: bool = False) -> str:
    """Return the JSON text of a schema for a grammar.

    Args:
        compact: separators exactly as `json.dumps` writes them, as models were trained to write calls; otherwise free
            but bounded white space.
        lenient: leave out keywords that no grammar can promise, instead of being refused for them.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if compact:
        options: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    else:
        options = {"whitespace_pattern": WHITESPACE}
    if lenient:
        options["lenient"] = True
    # Options are ours alone: a client's own could lift what we promise.
    return json.dumps({**_without_no_ops(schema), "x-guidance": options}, ensure_ascii=False)


def _without_no_ops(schema: dict[str, Any]) -> dict[str, Any]:
    """Drop keywords whose value asks for nothing, which the compiler would not know."""
    return {
        key: _clean(value)
        for key, value in schema.items()
        if key != "x-guidance" and not (key == "uniqueItems" and value is False)
    }


def _clean(value: object) -> object:
    if isinstance(value, dict):
        return _without_no_ops(value)
    return [_clean(item) for item in value] if isinstance(value, list) else value
