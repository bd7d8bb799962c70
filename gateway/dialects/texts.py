"""Texts and token ids as OpenAI's older APIs take them: one or many, of either kind. Below: `fields`.

Above: the request parsers of completions and embeddings.
"""

from __future__ import annotations

from typing import Any

from hostler.errors import ContextLengthExceeded, InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.fields import Fields, wrong_type

MAX_TOKEN_IDS = 1_000_000
_MAX_ID = 2**31 - 1
# No vocabulary has longer tokens, so a text of more bytes per context token cannot fit. It spares the worker the
# tokenizing of megabytes; the exact check stays there.
_MAX_BYTES_PER_TOKEN = 256

TextOrIds = str | pb.TokenIds


def parse_texts(fields: Fields, field: str, max_items: int) -> list[TextOrIds]:
    """Return the inputs of a field that holds a string, strings, token ids or arrays of token ids.

    Raises:
        InvalidRequest: absent, of another shape, or too many.
    """
    value = fields.raw(field)
    name = fields.name_of(field)
    if value is None:
        raise fields.missing(field)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array", value)
    if not value:
        raise InvalidRequest(f"Invalid '{name}': empty array. Expected at least one item.", param=name)
    if _is_id(value[0]):
        return [_ids(value, name)]
    if len(value) > max_items:
        raise InvalidRequest(
            f"Invalid '{name}': array too long. Expected at most {max_items} items, but got {len(value)}.", param=name
        )
    return [_item(item, f"{name}[{index}]") for index, item in enumerate(value)]


def check_lengths(texts: list[TextOrIds], max_context_tokens: int, field: str) -> None:
    """Refuse a text that cannot fit, whatever its tokens are.

    Args:
        max_context_tokens: of the model; 0 when it is not known.

    Raises:
        ContextLengthExceeded: says which.
    """
    limit = max_context_tokens * _MAX_BYTES_PER_TOKEN
    longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
    if limit and longest > limit:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_context_tokens} tokens. '{field}' holds a text of {longest} "
            "characters, which cannot fit. Shorten it.",
            param=field,
        )


def _item(value: Any, name: str) -> TextOrIds:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _ids(value, name)
    raise wrong_type(name, "a string or an array of token ids", value)


def _ids(values: list[Any], name: str) -> pb.TokenIds:
    if not values:
        raise InvalidRequest(f"Invalid '{name}': empty array. Expected at least one token id.", param=name)
    if len(values) > MAX_TOKEN_IDS:
        raise InvalidRequest(f"Invalid '{name}': more than {MAX_TOKEN_IDS} token ids.", param=name)
    for index, value in enumerate(values):
        if not _is_id(value) or not 0 <= value <= _MAX_ID:
            raise wrong_type(f"{name}[{index}]", "a token id", value)
    return pb.TokenIds(ids=values)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
