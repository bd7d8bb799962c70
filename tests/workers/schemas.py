"""Random JSON Schemas, bounded so that `max_tokens` is never an excuse. A seed gives the same schema everywhere."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("name", "count", "size", "tags", "kind", "ratio", "note", "done", "left", "right", "größe", "a b", 'q"uote')


def random_schema(seed: int, depth: int = 2) -> dict[str, Any]:
    """Return a schema of an object."""
    return _object(random.Random(seed), depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    keys = rng.sample(_WORDS, rng.randint(1, 3))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: _value(rng, depth - 1) for key in keys},
        "required": [key for key in keys if rng.random() < 0.7],
        "additionalProperties": False,
    }
    if rng.random() < 0.3:
        schema["title"], schema["description"] = "A thing", "Described."
    return schema


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "pattern", "integer", "number", "boolean", "enum", "const", "null", "date"]
    if depth > 0:
        kinds += ["object", "array", "anyOf"]
    kind = rng.choice(kinds)
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 8)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{2,6}$", "^\\d{3}-\\d{2}$", "^(yes|no)$"])}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randint(-5, 0), "maximum": rng.randint(1, 5000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 10}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 3, None, True, "x y"], 3)}
    if kind == "const":
        return {"const": rng.choice(["fixed", 7, None])}
    if kind == "date":
        return {"type": "string", "format": "date"}
    if kind == "object":
        return _object(rng, depth)
    if kind == "array":
        return {"type": "array", "items": _value(rng, depth - 1), "minItems": rng.randint(0, 1), "maxItems": 3}
    if kind == "anyOf":
        return {"anyOf": [_value(rng, depth - 1), {"type": "null"}]}
    return {"type": kind}
