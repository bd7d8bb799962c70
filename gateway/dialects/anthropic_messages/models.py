"""The list of models as Anthropic's clients know it. Above: `routes.models`; below: `routing`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from hostler.errors import InvalidRequest

from gateway.fields import show
from gateway.routing import Target

DEFAULT_LIMIT = 20
MAX_LIMIT = 1000


def model_object(target: Target) -> dict[str, Any]:
    """Return one model. How many tokens it takes is null until it has been loaded once."""
    created = datetime.fromtimestamp(target.route.created_unix_s, UTC)
    max_tokens = target.route.info.max_context_tokens or None
    return {
        "type": "model",
        "id": target.name,
        "display_name": target.name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": max_tokens,
        "max_tokens": max_tokens,
    }


def page_of_models(
    targets: Sequence[Target], *, limit: int, after_id: str | None, before_id: str | None
) -> dict[str, Any]:
    """Return one page: the models right after one, right before one, or from the beginning.

    Raises:
        InvalidRequest: the list has no such model.
    """
    names = [target.name for target in targets]
    begin, end = 0, len(targets)
    if after_id is not None:
        begin = _place(names, after_id, "after_id") + 1
    if before_id is not None:
        end = _place(names, before_id, "before_id")
    if after_id is None and before_id is not None:
        begin = max(begin, end - limit)
    page = targets[begin : min(end, begin + limit)]
    has_more = begin > 0 if after_id is None and before_id is not None else begin + limit < end
    return {
        "data": [model_object(target) for target in page],
        "has_more": has_more,
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
    }


def _place(names: Sequence[str], name: str, param: str) -> int:
    if name not in names:
        raise InvalidRequest(f"Invalid '{param}': there is no model {show(name)}.", param=param)
    return names.index(name)
