"""The OpenAPI document, put together once. Above: `routes.openapi`; below: `operations`, `requests`, `replies`."""

from __future__ import annotations

import functools
import re
from typing import Any

import hostler

from gateway.openapi.operations import ALWAYS, OPERATIONS, Operation
from gateway.openapi.replies import REPLIES
from gateway.openapi.requests import REQUESTS
from gateway.openapi.shapes import ref, string

_PARAMETER = re.compile(r"\{(\w+)\}")
_REASONS = {
    400: "A field is missing, wrong, out of bounds or not supported; `param` names it.",
    401: "The key is missing or wrong.",
    403: "The Host header, or the page that asks, is not allowed.",
    404: "No such model or object.",
    408: "The body stopped arriving.",
    413: "The body is too large.",
    415: "The body is not of the type that is taken.",
    429: "Too many requests wait; Retry-After says when to come again.",
    500: "A fault of the server.",
    503: "Not now: the model, its worker or the orchestrator is away; Retry-After says when to come again.",
}
_RETRY = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}}
# Path of what makes an object → the parameter that its id is elsewhere.
_MAKES = {"/responses": "response_id", "/conversations": "conversation_id"}
_EVENT = {"type": "object", "properties": {"event": string(), "data": string()}}
_EVENTS = {"text/event-stream": {"schema": _EVENT}}


@functools.cache
def document() -> dict[str, Any]:
    """Return the document; callers must not change it."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.public_path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hostler",
            "version": hostler.__version__,
            "description": "Every path under /v1 answers without /v1 as well; a slash at the end changes nothing.",
        },
        "security": [{"bearer": []}, {"x-api-key": []}],
        "paths": paths,
        "components": {
            "schemas": {**REQUESTS, **REPLIES},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    name = _name(operation)
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": string(minLength=1, maxLength=256)}
        for name in _PARAMETER.findall(operation.public_path)
    ]
    parameters += [
        {"name": query.name, "in": "query", "required": query.is_required, "schema": query.schema}
        for query in operation.query
    ]
    described: dict[str, Any] = {
        "operationId": name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {str(status): reply for status, reply in sorted(_replies(operation).items())},
    }
    if operation.method == "POST" and (made := _MAKES.get(operation.path)):
        described["responses"]["200"]["links"] = _links(made)
    if operation.takes is not None:
        content = {operation.sends: {"schema": ref(operation.takes)}}
        described["requestBody"] = {"required": True, "content": content}
    if not operation.needs_key:
        described["security"] = []
    return described


def _name(operation: Operation) -> str:
    return f"{operation.method.lower()}{re.sub(r'[^a-zA-Z0-9]+', '_', operation.public_path)}".rstrip("_")


def _links(parameter: str) -> dict[str, Any]:
    """Return what can be done with the object that an operation made: its `id` is a path's parameter."""
    uses = [operation for operation in OPERATIONS if f"{{{parameter}}}" in operation.path]
    return {_name(use): {"operationId": _name(use), "parameters": {parameter: "$response.body#/id"}} for use in uses}


def _replies(operation: Operation) -> dict[int, Any]:
    good: dict[str, Any] = {} if operation.streams == "only" else {operation.media: {"schema": ref(operation.reply)}}
    good |= _EVENTS if operation.streams else {}
    headers = {"x-request-id": {"schema": {"type": "string"}}}
    replies: dict[int, Any] = {200: {"description": operation.summary, "content": good, "headers": headers}}
    for status in (*ALWAYS, *operation.errors):
        content = {"application/json": {"schema": ref(operation.error)}}
        replies[status] = {"description": _REASONS[status], "content": content}
        if status in (429, 503):
            replies[status]["headers"] = _RETRY
    for status in operation.also:
        replies[status] = {"description": "Not now.", "content": good}
    return replies
