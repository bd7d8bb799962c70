"""The inference servicer: contract in, engine, contract out. Errors leave as statuses with their reason."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc
from hostler.channel import GENERATION_KEY, REQUEST_ID_KEY, metadata_value
from hostler.errors import HostlerError, Internal, InvalidRequest, abort
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import inference_pb2_grpc as rpc
from hostler.inference.v1 import line_pb2, speaking_pb2

from workers import translate, translate_hearing, translate_texts, translate_utterances
from workers.engine import Engine, Finish
from workers.host import WorkerHost
from workers.lines import Lines
from workers.transcription import Transcriber, TranscriptionFinish
from workers.utterances import Speaker, SpeechFinish
from workers.vectors import Embedder, Ranker

log = logging.getLogger(__name__)

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(slots=True)
class _Note:
    """What is known of a call under way: whether its last message is on its way. Nobody waits for what follows that."""

    is_complete: bool = False


@contextlib.contextmanager
def _noted(call: str, request_id: str) -> Iterator[_Note]:
    """Log how a call ended, once, under the id that the gateway and the orchestrator log it under, too."""
    began, outcome, note = time.monotonic(), "cancelled", _Note()
    try:
        yield note
        outcome = "served"
    except HostlerError as error:
        outcome = error.reason
        raise
    except Exception:
        outcome = "failed"
        raise
    finally:
        if note.is_complete and outcome == "cancelled":
            outcome = "served"
        duration_ms = round((time.monotonic() - began) * 1000, 1)
        log.info("call", extra={"request_id": request_id, "call": call, "outcome": outcome, "duration_ms": duration_ms})


class InferenceServicer(rpc.InferenceServiceServicer):
    """Serves the one loaded model of a worker."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self._lines = Lines()

    def end_lines(self) -> None:
        """Let those go who follow a line: nothing will come over it any more."""
        self._lines.end()

    async def Generate(  # noqa: N802  (gRPC's name)
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream one choice. A call that the client cancels ends at its next event and frees its slot."""
        request_id = metadata_value(context, REQUEST_ID_KEY) or ""
        try:
            generated = self._generate(request, context, request_id)
            async with contextlib.aclosing(self._lines.carry(request, generated)) as events:
                async for event in events:
                    yield event
        except HostlerError as error:
            await abort(context, error)
        except Exception:
            log.exception("generate failed", extra={"request_id": request_id})
            await abort(context, Internal("The worker failed on this request; its log has the details."))

    async def _generate(
        self, request: pb.GenerateRequest, context: Context, request_id: str
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        with _noted("generate", request_id) as note, self._serving(context) as engine:
            self._host.keep_alive_ms = request.keep_alive_ms if request.HasField("keep_alive_ms") else None
            wanted = translate.generation_request(request, engine.facts, request_id)
            async with contextlib.aclosing(engine.generate(wanted)) as events:  # type: ignore[type-var]
                async for event in events:
                    note.is_complete = isinstance(event, Finish)
                    yield translate.event(event)

    async def Follow(  # noqa: N802
        self, request: line_pb2.FollowRequest, context: Context
    ) -> AsyncIterator[pb.FollowResponse]:
        """Stream the events of all calls that name a line. Serves nobody, so it keeps no worker from falling asleep."""
        try:
            async with contextlib.aclosing(self._lines.follow(request.line)) as messages:
                async for message in messages:
                    yield message
        except HostlerError as error:
            await abort(context, error)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """Return one vector for each input."""

        async def embed(engine: Engine, request_id: str) -> pb.EmbedResponse:
            if not isinstance(engine, Embedder):
                raise InvalidRequest("This model does not make embeddings.", param="model")
            wanted = translate_texts.embedding_request(request, request_id)
            return translate_texts.embed_response(await engine.embed(wanted))

        return await self._answer(context, embed)

    async def Rerank(self, request: pb.RerankRequest, context: Context) -> pb.RerankResponse:  # noqa: N802
        """Return one score for each document."""

        async def rerank(engine: Engine, request_id: str) -> pb.RerankResponse:
            if not isinstance(engine, Ranker):
                raise InvalidRequest("This model does not rank documents.", param="model")
            wanted = translate_texts.ranking_request(request, request_id)
            return translate_texts.rerank_response(await engine.rank(wanted))

        return await self._answer(context, rerank)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """Return token ids of a text or a rendered chat."""

        async def tokenize(engine: Engine, _: str) -> pb.TokenizeResponse:
            ids = await engine.tokenize(translate_texts.tokenize_prompt(request))
            return pb.TokenizeResponse(ids=ids, max_context_tokens=engine.facts.max_context_tokens)

        return await self._answer(context, tokenize)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        """Return the text of token ids."""

        async def detokenize(engine: Engine, _: str) -> pb.DetokenizeResponse:
            worst, size = max(request.ids, default=0), engine.facts.vocab_size
            if size and worst >= size:
                raise InvalidRequest(f"Token id {worst} is outside the vocabulary of {size}.", param="tokens")
            return pb.DetokenizeResponse(text=await engine.detokenize(list(request.ids)))

        return await self._answer(context, detokenize)

    async def Transcribe(  # noqa: N802
        self, request: pb.TranscribeRequest, context: Context
    ) -> AsyncIterator[pb.TranscribeResponse]:
        """Stream what a recording says. A call that the client cancels ends at its next event and frees its rows."""
        request_id = metadata_value(context, REQUEST_ID_KEY) or ""
        try:
            with _noted("transcribe", request_id) as note, self._serving(context) as engine:
                if not isinstance(engine, Transcriber):
                    raise InvalidRequest("This model does not write down speech.", param="model")
                self._host.keep_alive_ms = request.keep_alive_ms if request.HasField("keep_alive_ms") else None
                wanted = translate_hearing.transcription_request(request, request_id)
                async with contextlib.aclosing(engine.transcribe(wanted)) as events:  # type: ignore[type-var]
                    async for event in events:
                        note.is_complete = isinstance(event, TranscriptionFinish)
                        yield translate_hearing.transcribe_response(event)
        except HostlerError as error:
            await abort(context, error)
        except Exception:
            log.exception("transcribing failed", extra={"request_id": request_id})
            await abort(context, Internal("The worker failed on this request; its log has the details."))

    async def Speak(  # noqa: N802
        self, request: speaking_pb2.SpeakRequest, context: Context
    ) -> AsyncIterator[speaking_pb2.SpeakResponse]:
        """Stream encoded speech. A call that the client cancels ends at its next event and frees the engine of it."""
        request_id = metadata_value(context, REQUEST_ID_KEY) or ""
        try:
            with _noted("speak", request_id) as note, self._serving(context) as engine:
                if not isinstance(engine, Speaker):
                    raise InvalidRequest("This model does not speak.", param="model")
                self._host.keep_alive_ms = request.keep_alive_ms if request.HasField("keep_alive_ms") else None
                wanted = translate_utterances.speech_request(request, request_id)
                is_first = True
                async with contextlib.aclosing(engine.speak(wanted)) as events:  # type: ignore[type-var]
                    async for event in events:
                        note.is_complete = isinstance(event, SpeechFinish)
                        yield translate_utterances.speak_response(event, is_first=is_first)
                        is_first = False
        except HostlerError as error:
            await abort(context, error)
        except Exception:
            log.exception("speaking failed", extra={"request_id": request_id})
            await abort(context, Internal("The worker failed on this request; its log has the details."))

    @contextlib.contextmanager
    def _serving(self, context: Context) -> Iterator[Engine]:
        """Give out the engine for one call, if the call is for this generation."""
        self._host.check_generation(metadata_value(context, GENERATION_KEY))
        with self._host.serving() as engine:
            yield engine

    async def _answer(self, context: Context, work: Callable[[Engine, str], Awaitable[T]]) -> T:
        """Check the generation and run a unary call's `work` with its request id; errors end the call by name."""
        request_id = metadata_value(context, REQUEST_ID_KEY) or ""
        try:
            with _noted(work.__name__, request_id), self._serving(context) as engine:
                return await work(engine, request_id)
        except HostlerError as error:
            await abort(context, error)
        except Exception:
            log.exception("a call failed", extra={"request_id": request_id})
            await abort(context, Internal("The worker failed on this request; its log has the details."))
