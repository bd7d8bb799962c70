"""Few words for JSON schemas. Above: `schemas`, `operations`; below: nothing. Every function returns a fresh schema."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def string(**more: Any) -> Schema:
    """Return the schema of a string."""
    return {"type": "string", **more}


def integer(low: int | None = None, high: int | None = None) -> Schema:
    """Return the schema of a whole number within low … high."""
    return _bounded("integer", low, high)


def number(low: float | None = None, high: float | None = None) -> Schema:
    """Return the schema of a number within low … high."""
    return _bounded("number", low, high)


def _bounded(kind: str, low: float | None, high: float | None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {"type": kind, **{name: value for name, value in bounds.items() if value is not None}}


def boolean() -> Schema:
    """Return the schema of true or false."""
    return {"type": "boolean"}


def array(items: Schema, low: int | None = None, high: int | None = None) -> Schema:
    """Return the schema of a list of low … high items."""
    bounds = {"minItems": low, "maxItems": high}
    return {"type": "array", "items": items, **{name: value for name, value in bounds.items() if value is not None}}


def one_of(*values: Any) -> Schema:
    """Return the schema of one of a few values."""
    return {"enum": list(values)}


def any_of(*schemas: Schema) -> Schema:
    """Return the schema of whatever one of the schemas takes."""
    return {"anyOf": list(schemas)}


def maybe(schema: Schema) -> Schema:
    """Return the same schema that takes null, too."""
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}


def map_of(values: Schema) -> Schema:
    """Return the schema of an object with any keys."""
    return {"type": "object", "additionalProperties": values}


def obj(required: dict[str, Schema], optional: dict[str, Schema] | None = None, text: str = "") -> Schema:
    """Return the schema of an object; further keys are allowed. An optional field takes null, which means absent."""
    properties = {
        **required,
        **{name: maybe(schema) if schema else schema for name, schema in (optional or {}).items()},
    }
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    return {**schema, "description": text} if text else schema


def ref(name: str) -> Schema:
    """Return a reference to a schema of `schemas.SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}
