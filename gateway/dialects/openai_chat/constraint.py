"""What a reply must be: `response_format`, and the field names that other servers gave regexes, choices and grammars.

Above: `request`; below: `fields`. The worker compiles; here only shapes and sizes are checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import orjson
from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.fields import Fields, dump_json, wrong_type

MAX_SCHEMA_CHARS = 256 * 1024
MAX_GRAMMAR_CHARS = 256 * 1024
MAX_REGEX_CHARS = 16 * 1024
MAX_CHOICES = 4096
MAX_CHOICE_CHARS = 4096
_REFUSED = ("structural_tag", "whitespace_pattern")


def parse_constraint(fields: Fields) -> pb.Constraint | None:
    """Return the constraint, or None for free text.

    Raises:
        InvalidRequest: malformed, or more than one.
        UnsupportedParameter: a kind that we do not have.
    """
    return only_one(fields, _response_format(fields), "response_format")


def only_one(fields: Fields, own: pb.Constraint | None, name: str) -> pb.Constraint | None:
    """Return the dialect's own constraint, or the one of the fields that other servers have; None for free text.

    Args:
        own: what the dialect's own field says.
        name: that field.

    Raises:
        InvalidRequest, UnsupportedParameter: as `parse_constraint` says.
    """
    found = [constraint for constraint in (own, *_guided(fields)) if constraint is not None]
    if len(found) > 1:
        raise InvalidRequest(
            f"Only one of '{name}', 'structured_outputs' and the 'guided_' fields may constrain a reply.",
            param="structured_outputs",
        )
    return found[0] if found else None


def _response_format(fields: Fields) -> pb.Constraint | None:
    form = fields.child("response_format")
    if form is None:
        return None
    kind = form.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise form.missing("type")
    if kind == "json_object":
        return pb.Constraint(json_object=True)
    if kind == "text":
        return None
    wrapper = form.required_child("json_schema")
    wrapper.boolean("strict")  # a schema is always kept to
    schema = wrapper.object("schema")
    if schema is None:
        raise wrapper.missing("schema")
    return schema_constraint(schema, wrapper.name_of("schema"), "response_format")


def _guided(fields: Fields) -> list[pb.Constraint | None]:
    outputs = fields.child("structured_outputs")
    found = [_one(fields, f"guided_{name}", read) for name, read in _READERS.items()]
    if outputs is None:
        return found
    outputs.refuse(dict.fromkeys(_REFUSED, ()))
    return found + [_one(outputs, name, read) for name, read in _READERS.items()]


def _one(fields: Fields, field: str, read: Callable[[Fields, str], pb.Constraint | None]) -> pb.Constraint | None:
    return None if fields.raw(field) is None else read(fields, field)


def _read_json(fields: Fields, field: str) -> pb.Constraint:
    value, name = fields.raw(field), fields.name_of(field)
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise InvalidRequest(f"Invalid '{name}': not valid JSON.", param=name) from None
    if not isinstance(value, dict):
        raise wrong_type(name, "a JSON schema", value)
    return schema_constraint(value, name, name)


def _read_json_object(fields: Fields, field: str) -> pb.Constraint | None:
    return pb.Constraint(json_object=True) if fields.boolean(field) else None


def _read_regex(fields: Fields, field: str) -> pb.Constraint:
    return pb.Constraint(regex=fields.string(field, MAX_REGEX_CHARS) or "")


def _read_grammar(fields: Fields, field: str) -> pb.Constraint:
    return pb.Constraint(grammar=fields.string(field, MAX_GRAMMAR_CHARS) or "")


def _read_choice(fields: Fields, field: str) -> pb.Constraint:
    name = fields.name_of(field)
    choices = fields.array(field, MAX_CHOICES) or []
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise InvalidRequest(f"Invalid '{name}': expected a non-empty array of non-empty strings.", param=name)
    if max(map(len, choices)) > MAX_CHOICE_CHARS:
        raise InvalidRequest(f"Invalid '{name}': a choice is longer than {MAX_CHOICE_CHARS} characters.", param=name)
    # A Lark literal is written as JSON writes strings.
    return pb.Constraint(grammar="start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


_READERS: dict[str, Callable[[Fields, str], pb.Constraint | None]] = {
    "json": _read_json,
    "json_object": _read_json_object,
    "regex": _read_regex,
    "choice": _read_choice,
    "grammar": _read_grammar,
}


def schema_constraint(schema: dict[str, object], name: str, param: str) -> pb.Constraint:
    """Return the constraint to one JSON schema, whose field is `name`; errors blame `param`."""
    text = dump_json(schema, name)
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(f"Invalid '{name}': longer than {MAX_SCHEMA_CHARS} characters.", param=param)
    return pb.Constraint(json_schema=text)
