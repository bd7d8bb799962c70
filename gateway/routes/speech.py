"""POST /audio/speech. Above: `app`; below: the OpenAI speech dialect, `dispatch`, `byte_stream`, `sse`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from hostler.inference.v1 import speaking_pb2 as pb

from gateway.body import read_json
from gateway.byte_stream import ByteStream
from gateway.dialects.openai_speech.request import parse_speech_request
from gateway.dialects.openai_speech.stream import speech_frames
from gateway.dispatch import Loading
from gateway.doors import request_id_of
from gateway.progress import loading_comment
from gateway.routing import find_speaking_model
from gateway.services import event_stream, services_of

router = APIRouter()

Events = AsyncGenerator[Loading | pb.SpeakResponse, None]


@router.post("/audio/speech", response_model=None)
async def create_speech(request: Request) -> Response:
    """Answer one speech request, as bytes or as events, while it is being spoken."""
    services = services_of(request)
    call = parse_speech_request(await read_json(request.headers, request.receive, services.config.max_body))
    routes = await services.table.first(services.patience.first_table_s)
    target = find_speaking_model(routes, call.model)
    request_id = request_id_of(request.scope)
    events = services.dispatcher.stream(target, lambda stub: stub.Speak, call.message(), request_id)
    if call.as_events:
        return event_stream(request, _frames(events))
    return ByteStream(
        _chunks(events),
        call.media_type,
        services.lifetime,
        request_id=request_id,
        stalled_reader_s=services.patience.stalled_reader_s,
    )


async def _frames(events: Events) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield loading_comment(event.progress) if isinstance(event, Loading) else speech_frames(event)


async def _chunks(events: Events) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            if not isinstance(event, Loading) and event.audio:
                yield event.audio
