"""POST /audio/transcriptions, /audio/translations. Above: `app`; below: the OpenAI dialect, `multipart`, `dispatch`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_transcriptions.reply import Transcript, delta_frame, done_frame, response_of
from gateway.dialects.openai_transcriptions.request import TranscriptionCall, parse_transcription_form
from gateway.dispatch import Loading
from gateway.doors import request_id_of
from gateway.multipart import read_form, refuse_foreign_pages
from gateway.progress import loading_comment
from gateway.routing import find_hearing_model
from gateway.services import event_stream, services_of

router = APIRouter()

Events = AsyncGenerator[Loading | pb.TranscribeResponse, None]


@router.post("/audio/transcriptions", response_model=None)
async def create_transcription(request: Request) -> Response:
    """Write a recording down."""
    return await _answer(request, translate=False)


@router.post("/audio/translations", response_model=None)
async def create_translation(request: Request) -> Response:
    """Write a recording down in English."""
    return await _answer(request, translate=True)


async def _answer(request: Request, *, translate: bool) -> Response:
    services = services_of(request)
    refuse_foreign_pages(request.headers, services.config.cors)
    form = await read_form(request.headers, request.receive, "file")
    call = parse_transcription_form(form, translate=translate)
    del form
    routes = await services.table.first(services.patience.first_table_s)
    target = find_hearing_model(routes, call.model)
    request_id = request_id_of(request.scope)
    events = services.dispatcher.stream(target, lambda stub: stub.Transcribe, call.message, request_id)
    if call.stream:
        return event_stream(request, _frames(events, call))
    return response_of(await services.lifetime.until_gone(request.receive, _whole(events)), call)


async def _whole(events: Events) -> Transcript:
    transcript = Transcript()
    async with aclosing(events):
        async for event in events:
            if not isinstance(event, Loading):
                transcript.add(event)
    return transcript


async def _frames(events: Events, call: TranscriptionCall) -> AsyncGenerator[bytes, None]:
    transcript, wants_logprobs = Transcript(), call.message.logprobs
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Loading):
                yield loading_comment(event.progress)
                continue
            known = len(transcript.logprobs)
            if text := transcript.add(event):
                yield delta_frame(text, transcript.logprobs[known:], wants_logprobs=wants_logprobs)
    yield done_frame(transcript, wants_logprobs=wants_logprobs)
