"""POST /responses, and what can be done with stored ones. Above: `app`; below: `gateway.responses`, the dialect."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from hostler.errors import HostlerError, InvalidRequest

from gateway.body import read_json
from gateway.dialects.openai_responses.endings import LOST, cancelled, failed
from gateway.dialects.openai_responses.items import MAX_ID_CHARS
from gateway.dialects.openai_responses.request import parse_responses_request
from gateway.dialects.openai_responses.response_object import in_this_dialect
from gateway.dispatch import Loading
from gateway.doors import cache_scope_of, request_id_of
from gateway.fields import show
from gateway.json_response import json_response
from gateway.progress import loading_comment
from gateway.responses.answer import Answer, Caller
from gateway.responses.database import Database, Stored
from gateway.responses.errors import NotStored
from gateway.routes.pages import page_of, query_flag, query_integer
from gateway.services import Services, event_stream, services_of
from gateway.sse import EventStream, event_frame

router = APIRouter()

_MAX_NUMBER = 2**53
_WHEN_DEAD = failed(LOST)


def caller_of(request: Request) -> Caller:
    """Return who sent a request."""
    return Caller(request_id_of(request.scope), cache_scope_of(request.scope))


@router.post("/responses", response_model=None)
async def create_response(request: Request) -> Response:
    """Answer one request: whole, streamed, or in the background."""
    services = services_of(request)
    body = await read_json(request.headers, request.receive, services.config.max_body)
    wanted = parse_responses_request(body)
    del body
    answer = await services.answering.prepare(wanted, caller_of(request))
    if wanted.background:
        response = await services.background.start(answer)
        if wanted.stream:
            return _follow(services, request, answer.response_id, after=-1)
        return json_response(response)
    if wanted.stream:
        return event_stream(request, _frames(answer), error_frames=lambda error: _failure(answer, error))
    return json_response(await services.lifetime.until_gone(request.receive, _whole(answer)))


@router.post("/responses/input_tokens", response_model=None)
async def count_input_tokens(request: Request) -> Response:
    """Tell how many tokens a request's prompt has, without answering it."""
    services = services_of(request)
    body = await read_json(request.headers, request.receive, services.config.max_body)
    answer = await services.answering.prepare(parse_responses_request(body), caller_of(request))
    try:
        count = await services.lifetime.until_gone(request.receive, answer.num_input_tokens())
    except HostlerError as error:
        raise in_this_dialect(error) from error.__cause__
    return json_response({"object": "response.input_tokens", "input_tokens": count})


@router.get("/responses/{response_id}", response_model=None)
async def get_response(request: Request, response_id: str) -> Response:
    """Return a stored response, or its events after `starting_after`, to its end."""
    services = services_of(request)
    stored = await _stored(services, request, response_id)
    if not query_flag(request, "stream"):
        return json_response(stored.body)
    if not stored.body["background"]:
        raise InvalidRequest(
            "Only responses that were created with 'background' can be streamed again. Fetch it whole.", param="stream"
        )
    after = query_integer(request, "starting_after", 0, _MAX_NUMBER, -1)
    return _follow(services, request, response_id, after)


@router.delete("/responses/{response_id}", response_model=None)
async def delete_response(request: Request, response_id: str) -> Response:
    """Forget a stored response; one that runs stops."""
    services = services_of(request)
    await services.responses.run(Database.delete, cache_scope_of(request.scope), _known(response_id), "response")
    services.background.stop(response_id)
    services.responses.announce(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post("/responses/{response_id}/cancel", response_model=None)
async def cancel_response(request: Request, response_id: str) -> Response:
    """Stop a background response, whichever process works on it; one that has ended stays as it is."""
    services = services_of(request)
    stored = await _stored(services, request, response_id)
    if not stored.body["background"]:
        raise InvalidRequest("Only responses that were created with 'background' can be cancelled.")
    ended = await services.responses.run(Database.end, cache_scope_of(request.scope), response_id, cancelled)
    services.background.stop(response_id)
    services.responses.announce(response_id)
    return json_response(ended.body)


@router.get("/responses/{response_id}/input_items", response_model=None)
async def list_input_items(request: Request, response_id: str) -> Response:
    """List a stored response's own input, page by page."""
    services = services_of(request)
    owner = cache_scope_of(request.scope)
    return json_response(page_of(await services.responses.run(Database.inputs, owner, _known(response_id)), request))


def _known(response_id: str) -> str:
    if len(response_id) > MAX_ID_CHARS:
        raise NotStored("response", show(response_id))
    return response_id


async def _stored(services: Services, request: Request, response_id: str) -> Stored:
    return await services.responses.get(cache_scope_of(request.scope), _known(response_id), _WHEN_DEAD)


async def _whole(answer: Answer) -> dict[str, Any]:
    response: dict[str, Any] = {}
    async with aclosing(answer.kept_events()) as events:
        async for event in events:
            if not isinstance(event, Loading):
                response = event.get("response", response)
    return response


async def _frames(answer: Answer) -> AsyncGenerator[bytes, None]:
    async with aclosing(answer.kept_events()) as events:
        async for event in events:
            yield loading_comment(event.progress) if isinstance(event, Loading) else event_frame(event)


def _failure(answer: Answer, error: HostlerError) -> bytes:
    return b"".join(map(event_frame, answer.builder.fail(error)))


def _follow(services: Services, request: Request, response_id: str, after: int) -> EventStream:
    owner, last = cache_scope_of(request.scope), after

    async def frames() -> AsyncGenerator[bytes, None]:
        nonlocal last
        async with aclosing(services.responses.follow(owner, response_id, after, _WHEN_DEAD)) as numbered:
            async for number, frame in numbered:
                last = number
                yield frame

    def failure(error: HostlerError) -> bytes:
        # The response goes on, only this look at it ends: no `response.failed`.
        told = {"type": "error", "code": error.reason, "message": error.message, "param": error.param}
        return event_frame({**told, "sequence_number": last + 1})

    return event_stream(request, frames(), error_frames=failure)
