"""POST /completions. Above: `app`; below: the OpenAI completions dialect, `dispatch`, `sse`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from hostler.inference.v1 import inference_pb2 as pb

from gateway.body import read_json
from gateway.dialects.openai_completions.reply import CompletionBuilder
from gateway.dialects.openai_completions.request import CompletionRequest, check_model, parse_completion_request
from gateway.dialects.openai_completions.stream import CompletionEncoder
from gateway.dispatch import Event, Loading, merge
from gateway.doors import cache_scope_of, request_id_of
from gateway.json_response import json_response
from gateway.progress import loading_comment
from gateway.routing import Target, find_writing_model
from gateway.services import Services, event_stream, services_of
from gateway.sse import DONE

router = APIRouter()


@dataclass(frozen=True, slots=True)
class _Job:
    services: Services
    request: CompletionRequest
    target: Target
    request_id: str
    cache_scope: str
    reply_id: str
    created_unix_s: int

    def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Return the events of all generations."""
        generate = self.services.dispatcher.generate
        return merge(
            [
                generate(self.target, choice, self.request_id, cache_scope=self.cache_scope)
                for choice in self.request.choices()
            ]
        )

    async def echoes(self) -> list[str]:
        """Return what each prompt's choices begin with; token ids become the text that they stand for."""
        if not self.request.echo:
            return ["" for _ in self.request.prompts]
        return [p if isinstance(p, str) else await self._text_of(p) for p in self.request.prompts]

    async def _text_of(self, ids: pb.TokenIds) -> str:
        message = pb.DetokenizeRequest(ids=ids.ids)
        ask = self.services.dispatcher.ask
        reply = await ask(self.target, lambda stub: stub.Detokenize, message, self.request_id)
        return reply.text


@router.post("/completions", response_model=None)
async def create_completion(request: Request) -> Response:
    """Answer one completions request, streamed or whole."""
    services = services_of(request)
    body = await read_json(request.headers, request.receive, services.config.max_body)
    completion = parse_completion_request(body)
    del body
    routes = await services.table.first(services.patience.first_table_s)
    target = find_writing_model(routes, completion.model)
    if target.route.HasField("info"):
        check_model(completion, target.route.info)
    job = _Job(
        services=services,
        request=completion,
        target=target,
        request_id=request_id_of(request.scope),
        cache_scope=cache_scope_of(request.scope),
        reply_id=f"cmpl-{uuid.uuid4().hex}",
        created_unix_s=int(time.time()),
    )
    if completion.stream:
        return event_stream(request, _frames(job))
    return json_response(await services.lifetime.until_gone(request.receive, _whole(job)))


async def _whole(job: _Job) -> dict[str, object]:
    request = job.request
    builder = CompletionBuilder(
        reply_id=job.reply_id,
        created_unix_s=job.created_unix_s,
        model=job.target.name,
        echoes=await job.echoes(),
        n=request.n,
        best_of=request.best_of,
        wants_logprobs=request.logprobs is not None,
    )
    async with aclosing(job.events()) as events:
        async for index, event in events:
            if not isinstance(event, Loading):
                builder.add(index, event)
    return builder.build()


async def _frames(job: _Job) -> AsyncGenerator[bytes, None]:
    request = job.request
    encoder = CompletionEncoder(
        reply_id=job.reply_id,
        created_unix_s=job.created_unix_s,
        model=job.target.name,
        echoes=await job.echoes(),
        n=request.n,
        include_usage=request.include_usage,
        wants_logprobs=request.logprobs is not None,
    )
    async with aclosing(job.events()) as events:
        async for index, event in events:
            frame = loading_comment(event.progress) if isinstance(event, Loading) else encoder.encode(index, event)
            if frame:
                yield frame
    if request.include_usage:
        yield encoder.usage()
    yield DONE
