"""An orchestrator and workers that do as a test says, on real gRPC over Unix sockets, and a gateway before them."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from hostler.channel import GENERATION_KEY, REQUEST_ID_KEY, metadata_value, new_server
from hostler.config import HostlerConfig
from hostler.errors import HostlerError, abort
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import line_pb2
from hostler.inference.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2

from gateway.app import create_app
from gateway.public_app import create_public_app
from gateway.server import GatewayServer, build_server
from gateway.services import Patience
from tests.gateway.fake_placement import FakePlacement
from tests.gateway.hearing import Hears
from tests.gateway.speaking import Speaks
from workers.lines import Lines

MODEL = "org/tiny-chat"
QUICK = Patience(
    ensure_s=10,
    first_table_s=0.3,
    gone_s=0.5,
    ping_s=0.15,
    first_comment_s=0.02,
    comment_gap_s=0.02,
    stalled_reader_s=60,
)


def text(value: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(text=pb.TextDelta(text=value))


def finish(
    completion: int = 1, reason: pb.FinishReason = pb.FINISH_REASON_STOP, prompt: int = 5
) -> pb.GenerateResponse:
    usage = pb.Usage(num_prompt_tokens=prompt, num_completion_tokens=completion)
    return pb.GenerateResponse(finish=pb.Finish(reason=reason, usage=usage))


def last_text(request: pb.GenerateRequest) -> str:
    return "".join(part.text for part in request.chat.messages[-1].parts)


Script = Callable[[pb.GenerateRequest], AsyncGenerator[pb.GenerateResponse, None]]


async def echo(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    """Say the last message back, word by word."""
    words = last_text(request).split()
    for index, word in enumerate(words):
        yield text(word if index == 0 else f" {word}")
    yield finish(len(words))


def fail_once(error: HostlerError) -> Script:
    """Fail the first request that comes, to whichever worker that runs this; echo all others."""
    failures = [error]

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if failures:
            raise failures.pop()
        async for event in echo(request):
            yield event

    return script


async def no_answer(request: Any) -> Any:
    raise AssertionError(f"nobody said what to answer to a {type(request).__name__}")


def counting(max_context_tokens: int = 8192) -> Callable[[Any], Awaitable[Any]]:
    """Return an `answer` to Tokenize that counts one token for each word of a chat."""

    async def count(request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        words = [word for m in request.chat.messages for part in m.parts for word in part.text.split()]
        return pb.TokenizeResponse(ids=range(len(words)), max_context_tokens=max_context_tokens)

    return count


class FakeWorker(Hears, Speaks, InferenceServiceServicer):
    """A worker that runs `script`, checks the generation, and remembers what it was asked."""

    def __init__(self, directory: Path, name: str = "a", generation: int = 7) -> None:
        self.address = f"unix:{directory}/w-{name}.sock"
        self.generation = generation
        self.script: Script = echo
        self.requests: list[pb.GenerateRequest] = []
        self.answer: Callable[[Any], Awaitable[Any]] = no_answer
        self.asked: list[Any] = []
        self.request_ids: list[str | None] = []
        self.num_running = 0
        self.changed = asyncio.Condition()
        self.lines = Lines()
        self._server: Any = None

    async def start(self) -> None:
        self._server = new_server()
        add_InferenceServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    def replica(self) -> placement_pb2.Replica:
        return placement_pb2.Replica(
            id=self.address, address=self.address, generation=self.generation, state=placement_pb2.MODEL_STATE_READY
        )

    async def until_running(self, number: int) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: self.num_running == number)

    async def _count(self, step: int) -> None:
        async with self.changed:
            self.num_running += step
            self.changed.notify_all()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        self.requests.append(request)
        self.request_ids.append(metadata_value(context, REQUEST_ID_KEY))
        assert metadata_value(context, GENERATION_KEY) == str(self.generation)
        await self._count(1)
        try:
            async with aclosing(self.lines.carry(request, self.script(request))) as events:
                async for event in events:
                    yield event
        except HostlerError as error:
            await abort(context, error)
        finally:
            await asyncio.shield(self._count(-1))

    async def Follow(self, request: line_pb2.FollowRequest, context: Any) -> AsyncIterator[pb.FollowResponse]:  # noqa: N802
        async for message in self.lines.follow(request.line):
            yield message

    async def _answer(self, request: Any, context: Any) -> Any:
        """Answer a unary call with what `answer` returns or raises."""
        self.asked.append(request)
        assert metadata_value(context, GENERATION_KEY) == str(self.generation)
        await self._count(1)
        try:
            return await self.answer(request)
        except HostlerError as error:
            await abort(context, error)
        finally:
            await asyncio.shield(self._count(-1))

    Embed = Rerank = Tokenize = Detokenize = _answer


def route(
    *workers: FakeWorker,
    name: str = MODEL,
    aliases: Sequence[str] = ("tiny",),
    adapters: Sequence[str] = (),
    state: Any = placement_pb2.MODEL_STATE_UNLOADED,
    **info: Any,
) -> placement_pb2.ModelRoute:
    return placement_pb2.ModelRoute(
        name=name,
        aliases=aliases,
        adapters=adapters,
        state=placement_pb2.MODEL_STATE_READY if workers else state,
        replicas=[worker.replica() for worker in workers],
        engine=lifecycle_pb2.ENGINE_KIND_SCRIPTED,
        created_unix_s=1_700_000_000,
        owned_by="org",
        info=lifecycle_pb2.ModelInfo(max_context_tokens=8192, **info) if workers or info else None,
    )


@dataclass
class World:
    """Everything between a client and a fake worker."""

    directory: Path
    placement: FakePlacement
    worker: FakeWorker
    app: FastAPI
    client: httpx.AsyncClient
    url: str = ""
    public_url: str = ""
    server: GatewayServer | None = None
    workers: list[FakeWorker] = field(default_factory=list)

    async def publish(self, *models: placement_pb2.ModelRoute) -> None:
        """Publish a table and wait until the gateway has it."""
        table = self.app.state.services.table
        changed = table._changed
        await self.placement.publish(*models)
        await asyncio.wait_for(changed.wait(), 5)

    async def add_worker(self, name: str, generation: int = 8) -> FakeWorker:
        worker = FakeWorker(self.directory, name, generation)
        await worker.start()
        self.workers.append(worker)
        return worker

    async def chat(self, content: str = "hello there", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return await self.client.post("/v1/chat/completions", json=body)


@asynccontextmanager
async def world(
    *, over_tcp: bool = True, config: dict[str, Any] | None = None, patience: Patience = QUICK
) -> AsyncIterator[World]:
    """Start fakes and a gateway, by uvicorn on a free port or (cheaper, no streaming) by direct calls."""
    directory = Path(tempfile.mkdtemp(prefix="hgw-"))
    placement = FakePlacement(directory)
    worker = FakeWorker(directory)
    await placement.start()
    await worker.start()
    app = create_app(HostlerConfig(**(config or {})), placement_target=placement.target, patience=patience)
    here = World(directory, placement, worker, app, httpx.AsyncClient(), workers=[worker])
    try:
        if over_tcp:
            async with _uvicorn(here):
                await here.publish(route(worker))
                yield here
        else:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://localhost") as here.client,
            ):
                await here.publish(route(worker))
                yield here
    finally:
        await asyncio.gather(here.placement.stop(), *(fake.stop() for fake in here.workers))
        shutil.rmtree(directory, ignore_errors=True)


@asynccontextmanager
async def _uvicorn(here: World) -> AsyncIterator[None]:
    listener = socket.create_server(("127.0.0.1", 0))
    here.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    here.server = build_server(here.app, drain_s=0.2, lifetime=here.app.state.services.lifetime)
    services = here.app.state.services
    if services.config.public.enabled:
        door = socket.create_server(("127.0.0.1", 0))
        here.public_url = f"http://127.0.0.1:{door.getsockname()[1]}"
        here.server.add_public(create_public_app(services, told=here.directory / "tunnel.json"), door)
    started = asyncio.Event()
    start_up = here.server.startup

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await start_up(sockets)
        started.set()

    here.server.startup = startup  # type: ignore[method-assign]
    serving = asyncio.create_task(here.server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(10):
            await started.wait()
        async with httpx.AsyncClient(base_url=here.url, timeout=10) as here.client:
            yield
    finally:
        here.server.stop()
        await asyncio.wait_for(serving, 10)
