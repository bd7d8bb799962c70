"""Lists that clients read page by page, and query parameters. Above: `responses`, `conversations`."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from hostler.errors import InvalidRequest

from gateway.fields import show

DEFAULT_LIMIT = 20
MAX_LIMIT = 100
_MAX_DIGITS = 18


def page_of(items: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """Return one page of `items`, which are oldest first, as `limit`, `order` and `after` ask.

    Raises:
        InvalidRequest: a parameter is out of bounds, or `after` names nothing in the list.
    """
    limit = query_integer(request, "limit", 1, MAX_LIMIT, DEFAULT_LIMIT)
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"Invalid value: {show(order)}. Supported values are: 'asc', 'desc'.", param="order")
    ordered = items if order == "asc" else items[::-1]
    begin = 0
    if (after := request.query_params.get("after")) is not None:
        begin = next((i + 1 for i, item in enumerate(ordered) if item["id"] == after), -1)
        if begin < 0:
            raise InvalidRequest(f"Invalid 'after': the list has no item {show(after)}.", param="after")
    data = ordered[begin : begin + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else "",
        "last_id": data[-1]["id"] if data else "",
        "has_more": begin + limit < len(ordered),
    }


def query_integer(request: Request, name: str, low: int, high: int, default: int) -> int:
    """Return a whole number of the query, within low … high.

    Raises:
        InvalidRequest: it is none, or out of bounds.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS) or not low <= int(text) <= high:
        raise InvalidRequest(
            f"Invalid '{name}': expected a whole number from {low} to {high}, but got {show(text)}.", param=name
        )
    return int(text)


def query_flag(request: Request, name: str) -> bool:
    """Return whether a flag of the query is set.

    Raises:
        InvalidRequest: it says neither true nor false.
    """
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"Invalid '{name}': expected true or false, but got {show(text)}.", param=name)
    return text in ("true", "1")
