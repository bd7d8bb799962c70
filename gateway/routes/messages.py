"""POST /messages and /messages/count_tokens. Above: `app`; below: Anthropic's dialect, `dispatch`, `sse`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from hostler.inference.v1 import inference_pb2 as pb

from gateway.body import read_json
from gateway.dialects.anthropic_messages.builder import MessageBuilder, new_message_id
from gateway.dialects.anthropic_messages.errors import error_body
from gateway.dialects.anthropic_messages.request import (
    MessagesRequest,
    parse_count_request,
    parse_messages_request,
)
from gateway.dialects.openai_chat.request import check_capabilities
from gateway.dispatch import Event, Loading
from gateway.doors import cache_scope_of, request_id_of
from gateway.json_response import json_response
from gateway.progress import loading_comment
from gateway.routing import Target, find_chat_model
from gateway.services import Services, event_stream, services_of
from gateway.sse import PING, event_frame

router = APIRouter()

_PING_EVENT = event_frame({"type": "ping"})


@dataclass(frozen=True, slots=True)
class _Job:
    services: Services
    request: MessagesRequest
    target: Target
    request_id: str
    cache_scope: str
    builder: MessageBuilder

    def events(self) -> AsyncGenerator[Event, None]:
        return self.services.dispatcher.generate(
            self.target, self.request.chat.generate, self.request_id, cache_scope=self.cache_scope
        )

    async def num_prompt_tokens(self) -> int:
        """Return the tokens of the prompt, as the worker that owns the template counts them."""
        wanted = pb.TokenizeRequest(chat=self.request.chat.generate.chat)
        counted = await self.services.dispatcher.ask(self.target, lambda stub: stub.Tokenize, wanted, self.request_id)
        return len(counted.ids)


@router.post("/messages", response_model=None)
async def create_message(request: Request) -> Response:
    """Answer one request, streamed or whole."""
    services = services_of(request)
    body = await read_json(request.headers, request.receive, services.config.max_body)
    wanted = parse_messages_request(body)
    del body
    job = await _prepare(request, services, wanted)
    if not wanted.chat.stream:
        return json_response(await services.lifetime.until_gone(request.receive, _whole(job)))
    return event_stream(
        request,
        _frames(job),
        error_frames=lambda error: event_frame(error_body(error, job.request_id)),
        # Clients take nothing for an event before the message has begun.
        ping=lambda: _PING_EVENT if job.builder.is_open else PING,
    )


@router.post("/messages/count_tokens", response_model=None)
async def count_tokens(request: Request) -> Response:
    """Tell how many tokens a request's prompt has, without answering it."""
    services = services_of(request)
    body = await read_json(request.headers, request.receive, services.config.max_body)
    job = await _prepare(request, services, parse_count_request(body))
    count = await services.lifetime.until_gone(request.receive, job.num_prompt_tokens())
    return json_response({"input_tokens": count})


async def _prepare(request: Request, services: Services, wanted: MessagesRequest) -> _Job:
    """Find the model, check what it can do, and fetch what the request gives by address."""
    chat = wanted.chat
    routes = await services.table.first(services.patience.first_table_s)
    target = find_chat_model(routes, chat.model)
    if target.route.HasField("info"):
        check_capabilities(chat, target.route.info)
    if chat.links:
        filling = services.linked_images.fill(chat.generate.chat.messages, chat.links)
        await services.lifetime.until_gone(request.receive, filling)
    builder = MessageBuilder(
        message_id=new_message_id(), model=target.name, thoughts=wanted.thoughts, max_tokens=wanted.max_tokens
    )
    return _Job(services, wanted, target, request_id_of(request.scope), cache_scope_of(request.scope), builder)


async def _whole(job: _Job) -> dict[str, object]:
    async with aclosing(job.events()) as events:
        async for event in events:
            if not isinstance(event, Loading):
                job.builder.add(event)
    return job.builder.message()


async def _frames(job: _Job) -> AsyncGenerator[bytes, None]:
    async with aclosing(job.events()) as events:
        async for event in events:
            if isinstance(event, Loading):
                yield loading_comment(event.progress)
                continue
            made = [] if job.builder.is_open else job.builder.open(await _first_usage(job, event))
            made += job.builder.add(event)
            if made:
                yield b"".join(map(event_frame, made))


async def _first_usage(job: _Job, event: pb.GenerateResponse) -> pb.Usage:
    """Return the prompt's tokens for the beginning of a message, from a worker's first event."""
    if event.HasField("finish"):
        return pb.Usage(
            num_prompt_tokens=event.finish.usage.num_prompt_tokens,
            num_cached_tokens=event.finish.usage.num_cached_tokens,
        )
    progress = event.progress
    if progress.num_prompt_tokens:
        return pb.Usage(num_prompt_tokens=progress.num_prompt_tokens, num_cached_tokens=progress.num_prefilled_tokens)
    return pb.Usage(num_prompt_tokens=await job.num_prompt_tokens())
