"""POST /chat/completions. Above: `app`; below: the OpenAI chat dialect, `dispatch`, `sse`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from hostler.inference.v1 import inference_pb2 as pb

from gateway.body import read_json
from gateway.dialects.openai_chat.reply import ReplyBuilder
from gateway.dialects.openai_chat.request import ChatRequest, check_capabilities, parse_chat_request
from gateway.dialects.openai_chat.stream import ChunkEncoder
from gateway.dialects.openai_responses.as_chat import is_foreign, parse_as_chat
from gateway.dispatch import Event, Loading, merge
from gateway.doors import cache_scope_of, request_id_of
from gateway.json_response import json_response
from gateway.mcp.chat_turns import Toolbox, chat_turns, open_toolbox
from gateway.progress import loading_comment
from gateway.responses.answer import Caller
from gateway.routing import Target, find_chat_model
from gateway.services import Services, event_stream, services_of
from gateway.sse import DONE

router = APIRouter()


@dataclass(frozen=True, slots=True)
class _Job:
    services: Services
    request: ChatRequest
    target: Target
    request_id: str
    cache_scope: str
    reply_id: str
    created_unix_s: int

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Return the events of all choices."""
        toolbox = await self._toolbox()
        choices = [self.request.choice(i) for i in range(self.request.n)]
        if toolbox is not None and toolbox.tools:
            context = self.target.route.info.max_context_tokens
            streams = [chat_turns(c, toolbox, self._generate, self._count, context=context) for c in choices]
        else:
            streams = [self._generate(choice) for choice in choices]
        return merge(streams)

    def _generate(self, choice: pb.GenerateRequest) -> AsyncGenerator[Event, None]:
        generate = self.services.dispatcher.generate
        return generate(self.target, choice, self.request_id, cache_scope=self.cache_scope)

    async def _count(self, chat: pb.Chat) -> tuple[int, int]:
        caller = Caller(self.request_id, self.cache_scope)
        return await self.services.answering.count(self.target, chat, caller)

    async def _toolbox(self) -> Toolbox | None:
        mcp, route = self.services.mcp, self.target.route
        asked_for = self.request.mcp_servers
        names = mcp.for_chat if asked_for is None else asked_for
        if not names or (asked_for is None and route.HasField("info") and not route.info.supports_tools):
            return None
        connections = [(name, mcp.configured(name, "mcp_servers")) for name in names]
        own = [tool.name for tool in self.request.generate.chat.tools]
        return await open_toolbox(connections, own, is_asked_for=asked_for is not None)


@router.post("/chat/completions", response_model=None)
async def create_chat_completion(request: Request) -> Response:
    """Answer one chat request, streamed or whole."""
    services = services_of(request)
    body = await read_json(request.headers, request.receive, services.config.max_body)
    chat = parse_as_chat(body) if is_foreign(body) else parse_chat_request(body)
    del body
    routes = await services.table.first(services.patience.first_table_s)
    target = find_chat_model(routes, chat.model)
    if chat.mcp_servers or (chat.mcp_servers is None and services.mcp.for_chat):
        await services.mcp.load()
    for name in chat.mcp_servers or ():
        services.mcp.configured(name, "mcp_servers")
    if target.route.HasField("info"):
        check_capabilities(chat, target.route.info)
    if chat.links:
        filling = services.linked_images.fill(chat.generate.chat.messages, chat.links)
        await services.lifetime.until_gone(request.receive, filling)
    job = _Job(
        services=services,
        request=chat,
        target=target,
        request_id=request_id_of(request.scope),
        cache_scope=cache_scope_of(request.scope),
        reply_id=f"chatcmpl-{uuid.uuid4().hex}",
        created_unix_s=int(time.time()),
    )
    if chat.stream:
        return event_stream(request, _frames(job))
    return json_response(await services.lifetime.until_gone(request.receive, _whole(job)))


async def _whole(job: _Job) -> dict[str, object]:
    builder = ReplyBuilder(
        reply_id=job.reply_id,
        created_unix_s=job.created_unix_s,
        model=job.target.name,
        n=job.request.n,
        wants_logprobs=job.request.wants_logprobs,
    )
    async with aclosing(await job.events()) as events:
        async for index, event in events:
            if not isinstance(event, Loading):
                builder.add(index, event)
    return builder.build()


async def _frames(job: _Job) -> AsyncGenerator[bytes, None]:
    encoder = ChunkEncoder(
        reply_id=job.reply_id,
        created_unix_s=job.created_unix_s,
        model=job.target.name,
        include_usage=job.request.include_usage,
        wants_logprobs=job.request.wants_logprobs,
    )
    async with aclosing(await job.events()) as events:
        async for index, event in events:
            frame = loading_comment(event.progress) if isinstance(event, Loading) else encoder.encode(index, event)
            if frame:
                yield frame
    if job.request.include_usage:
        yield encoder.usage()
    yield DONE
