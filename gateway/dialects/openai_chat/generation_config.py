"""The `generation_config` that `transformers chat` sends → fields of OpenAI's names. Above: `request`; below: `fields`.

It is the JSON text of a transformers GenerationConfig. Keys that we know become the field they mean; the others are
about that library and are ignored. Whatever the request says at its top level wins.
"""

from __future__ import annotations

from typing import Any

import orjson
from hostler.errors import InvalidRequest

from gateway.fields import wrong_type

_MAX_CHARS = 64 * 1024
_SAME_NAME = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")


def read_generation_config(value: object) -> dict[str, Any]:
    """Return request fields that a generation config stands for; empty when it is absent."""
    if value is None:
        return {}
    if isinstance(value, str):
        if len(value) > _MAX_CHARS:
            raise InvalidRequest("Invalid 'generation_config': string too long.", param="generation_config")
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise InvalidRequest("Invalid 'generation_config': not valid JSON.", param="generation_config") from None
    if not isinstance(value, dict):
        raise wrong_type("generation_config", "an object as JSON text", value)
    fields = {name: value[name] for name in _SAME_NAME if value.get(name) is not None}
    if value.get("max_new_tokens") is not None:
        fields["max_tokens"] = value["max_new_tokens"]
    if value.get("stop_strings") is not None:
        fields["stop"] = value["stop_strings"]
    if value.get("do_sample") is False:
        fields["temperature"] = 0
    return fields


def with_defaults(body: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return `body` with `defaults` in the places that it leaves open."""
    if not defaults:
        return body
    merged = {**body}
    for name, value in defaults.items():
        if name == "max_tokens" and body.get("max_completion_tokens") is not None:
            continue
        if name == "repetition_penalty" and body.get("repeat_penalty") is not None:
            continue
        if merged.get(name) is None:
            merged[name] = value
    return merged
