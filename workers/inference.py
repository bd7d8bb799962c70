"""The inference servicer: contract in, engine, contract out. Errors leave as statuses with their reason."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from hostler.channel import GENERATION_KEY, REQUEST_ID_KEY, metadata_value
from hostler.errors import HostlerError, Internal, UnsupportedParameter, abort
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import inference_pb2_grpc as rpc

from workers import translate
from workers.engine import Prompt, TextPrompt
from workers.host import WorkerHost

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class InferenceServicer(rpc.InferenceServiceServicer):
    """Serves the one loaded model of a worker."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def Generate(  # noqa: N802  (gRPC's name)
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream one choice. A call that the client cancels ends at its next event and frees its slot."""
        request_id = metadata_value(context, REQUEST_ID_KEY) or ""
        try:
            self._host.check_generation(metadata_value(context, GENERATION_KEY))
            with self._host.serving() as engine:
                self._host.keep_alive_ms = request.keep_alive_ms if request.HasField("keep_alive_ms") else None
                wanted = translate.generation_request(request, engine.facts, request_id)
                async with contextlib.aclosing(engine.generate(wanted)) as events:  # type: ignore[type-var]
                    async for event in events:
                        yield translate.event(event)
        except HostlerError as error:
            await abort(context, error)
        except Exception:
            log.exception("generate failed", extra={"request_id": request_id})
            await abort(context, Internal("The worker failed on this request; its log has the details."))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """Return token ids of a text or a rendered chat."""
        try:
            engine = self._host.engine
            prompt: Prompt
            if request.WhichOneof("prompt") == "chat":
                prompt = translate.chat_prompt(request.chat)
            else:
                prompt = TextPrompt(request.text)
            ids = await engine.tokenize(prompt)
            return pb.TokenizeResponse(ids=ids, max_context_tokens=engine.facts.max_context_tokens)
        except HostlerError as error:
            await abort(context, error)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        """Return the text of token ids."""
        try:
            return pb.DetokenizeResponse(text=await self._host.engine.detokenize(list(request.ids)))
        except HostlerError as error:
            await abort(context, error)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """Refuse: a text engine gives no embeddings."""
        await abort(context, UnsupportedParameter("This model gives no embeddings.", param="model"))

    async def Transcribe(  # noqa: N802
        self, request: pb.TranscribeRequest, context: Context
    ) -> AsyncIterator[pb.TranscribeResponse]:
        """Refuse: a text engine hears nothing."""
        await abort(context, UnsupportedParameter("This model does not transcribe speech.", param="model"))
        yield pb.TranscribeResponse()

    async def Speak(self, request: pb.SpeakRequest, context: Context) -> AsyncIterator[pb.SpeakResponse]:  # noqa: N802
        """Refuse: a text engine does not speak."""
        await abort(context, UnsupportedParameter("This model does not speak.", param="model"))
        yield pb.SpeakResponse()
