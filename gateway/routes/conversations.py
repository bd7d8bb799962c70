"""/conversations: lists of items that responses read and extend. Above: `app`; below: `gateway.responses`.

Whoever holds a response's `conversation` can make, read, extend and delete it; the rest of OpenAI's API is not here.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from hostler.errors import InvalidRequest

from gateway.body import read_json
from gateway.dialects.openai_responses.items import MAX_ID_CHARS, Item, new_id, parse_input
from gateway.dialects.openai_responses.messages import build_messages
from gateway.dialects.openai_responses.request import parse_metadata
from gateway.doors import cache_scope_of
from gateway.fields import Fields, show
from gateway.json_response import json_response
from gateway.responses.database import Database
from gateway.responses.errors import NotStored
from gateway.routes.pages import page_of
from gateway.services import Services, services_of

router = APIRouter()

MAX_NEW_ITEMS = 20


@router.post("/conversations", response_model=None)
async def create_conversation(request: Request) -> Response:
    """Make a conversation, perhaps with its first items."""
    services = services_of(request)
    if not services.responses.is_on:
        raise InvalidRequest("This server stores nothing, so it has no conversations.")
    fields = await _fields(services, request)
    items = _new_items(fields, required=False)
    conversation = {
        "id": new_id("conv"),
        "object": "conversation",
        "created_at": int(time.time()),
        "metadata": parse_metadata(fields) or {},
    }
    await services.responses.run(Database.insert_conversation, cache_scope_of(request.scope), conversation, items)
    return json_response(conversation)


@router.get("/conversations/{conversation_id}", response_model=None)
async def get_conversation(request: Request, conversation_id: str) -> Response:
    """Describe a conversation."""
    return json_response(await _conversation(services_of(request), request, conversation_id))


@router.post("/conversations/{conversation_id}", response_model=None)
async def update_conversation(request: Request, conversation_id: str) -> Response:
    """Replace a conversation's metadata."""
    services = services_of(request)
    fields = await _fields(services, request)
    conversation = await _conversation(services, request, conversation_id)
    conversation["metadata"] = parse_metadata(fields) or {}
    await services.responses.run(Database.update_conversation, cache_scope_of(request.scope), conversation)
    return json_response(conversation)


@router.delete("/conversations/{conversation_id}", response_model=None)
async def delete_conversation(request: Request, conversation_id: str) -> Response:
    """Forget a conversation; responses that were part of it stay."""
    services = services_of(request)
    owner = cache_scope_of(request.scope)
    await services.responses.run(Database.delete, owner, _known(conversation_id), "conversation")
    return json_response({"id": conversation_id, "object": "conversation.deleted", "deleted": True})


@router.get("/conversations/{conversation_id}/items", response_model=None)
async def list_items(request: Request, conversation_id: str) -> Response:
    """List a conversation's items, page by page."""
    return json_response(page_of(await _items(services_of(request), request, conversation_id), request))


@router.post("/conversations/{conversation_id}/items", response_model=None)
async def create_items(request: Request, conversation_id: str) -> Response:
    """Add items at a conversation's end."""
    services = services_of(request)
    fields = await _fields(services, request)
    items = _new_items(fields, required=True)
    owner = cache_scope_of(request.scope)
    await services.responses.run(Database.extend_conversation, owner, _known(conversation_id), items)
    first, last = items[0]["id"], items[-1]["id"]
    return json_response({"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": False})


@router.get("/conversations/{conversation_id}/items/{item_id}", response_model=None)
async def get_item(request: Request, conversation_id: str, item_id: str) -> Response:
    """Return one item of a conversation."""
    for item in await _items(services_of(request), request, conversation_id):
        if item["id"] == item_id:
            return json_response(item)
    raise NotStored("item", item_id)


@router.delete("/conversations/{conversation_id}/items/{item_id}", response_model=None)
async def delete_item(request: Request, conversation_id: str, item_id: str) -> Response:
    """Take one item out of a conversation."""
    services = services_of(request)
    owner = cache_scope_of(request.scope)
    await services.responses.run(Database.delete_conversation_item, owner, _known(conversation_id), item_id)
    return json_response(await _conversation(services, request, conversation_id))


async def _fields(services: Services, request: Request) -> Fields:
    return Fields(await read_json(request.headers, request.receive, services.config.max_body))


def _known(conversation_id: str) -> str:
    if len(conversation_id) > MAX_ID_CHARS:
        raise NotStored("conversation", show(conversation_id))
    return conversation_id


async def _conversation(services: Services, request: Request, conversation_id: str) -> dict[str, Any]:
    owner = cache_scope_of(request.scope)
    return await services.responses.run(Database.conversation, owner, _known(conversation_id))


async def _items(services: Services, request: Request, conversation_id: str) -> list[Item]:
    owner = cache_scope_of(request.scope)
    return await services.responses.run(Database.conversation_items, owner, _known(conversation_id))


def _new_items(fields: Fields, *, required: bool) -> list[Item]:
    items = parse_input(fields, "items") or []
    if required and not items:
        raise fields.missing("items")
    if len(items) > MAX_NEW_ITEMS:
        raise InvalidRequest(f"Invalid 'items': more than {MAX_NEW_ITEMS} at once.", param="items")
    if any(item["type"] == "item_reference" for item in items):
        raise InvalidRequest("Invalid 'items': a reference cannot be added; send the item itself.", param="items")
    # What a model could not be shown later is refused now.
    build_messages(None, [(f"items[{index}]", item) for index, item in enumerate(items)], [])
    return items
