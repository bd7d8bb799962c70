"""A placement service and an HTTP server that answer from a script, for the tests of the command line."""

from __future__ import annotations

import fcntl
import http.server
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from hostler import errors, rundir
from hostler.placement.v1 import placement_pb2 as pb
from hostler.placement.v1 import placement_pb2_grpc as pb_grpc

GIB = 2**30


def status() -> pb.GetStatusResponse:
    """One CPU, two models, one of them loaded and busy."""
    answer = pb.GetStatusResponse(version="0.1.0", started_unix_ms=1_700_000_000_000)
    device = answer.devices.add(id="cpu", kind=pb.DEVICE_KIND_CPU, name="Some CPU")
    device.budget_bytes, device.reserved_bytes, device.foreign_bytes = 8 * GIB, 2 * GIB, GIB
    device.total_bytes = 16 * GIB
    ready = answer.models.add(name="tiny", aliases=["org/tiny"], state=pb.MODEL_STATE_READY, engine=1)
    ready.quantize = "int4"
    ready.info.num_parameters, ready.info.max_context_tokens = 135_000_000, 2048
    answer.models.add(name="broken", state=pb.MODEL_STATE_FAILED, failure="no space left on the disk")
    replica = answer.replicas.add(model="tiny", reserved_bytes=2 * GIB, reason="the only device")
    replica.parts.add(device="cpu", num_bytes=2 * GIB)
    replica.completion_tokens_per_s = 41.27
    replica.replica.id, replica.replica.generation, replica.replica.state = "w1", 7, pb.MODEL_STATE_READY
    replica.loaded_unix_ms = replica.last_used_unix_ms = 1_700_000_000_000
    worker = replica.worker
    worker.pid, worker.num_running, worker.num_queued, worker.max_running, worker.num_steps = 4242, 3, 1, 16, 99
    worker.num_completion_tokens_total = 1000
    worker.kv_reserved_bytes, worker.kv_used_bytes = GIB, GIB // 4
    answer.models.add(name="napper", state=pb.MODEL_STATE_ASLEEP)
    asleep = answer.replicas.add(model="napper", pinned=True, reason="idle for 5 min")
    asleep.replica.id, asleep.replica.state = "w2", pb.MODEL_STATE_ASLEEP
    asleep.worker.host_bytes = GIB // 2
    answer.models.add(name="later", state=pb.MODEL_STATE_UNLOADED)
    answer.nodes.add(sleep_budget_bytes=4 * GIB, sleep_used_bytes=GIB // 2, num_blank_workers=1)
    return answer


def event(number: int, kind: pb.EventKind.ValueType = pb.EVENT_KIND_EVICTED, **fields: Any) -> pb.WatchEventsResponse:
    """One event; by default of a day in 2023."""
    usual = {"unix_ms": 1_700_000_000_000 + number, "model": "tiny", "device": "cuda:0", "why": "room was needed"}
    return pb.WatchEventsResponse(number=number, kind=kind, **(usual | fields))


class FakePlacement(pb_grpc.PlacementServiceServicer):
    """Knows the model "tiny"; everything else is not found. Remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.pinned: dict[str, bool] = {}
        self.status = status()
        self.plan = pb.PlanModelResponse(
            feasible=True,
            parts=[pb.DeviceBytes(device="cpu", num_bytes=3 * GIB)],
            needed_bytes=3 * GIB,
            kv_cache_bytes=GIB,
            evict_models=["other"],
            sleep_models=["napper"],
            expected_ms=12_000,
            reason="other is idle longest",
            quantize="int4",
        )
        self.past: list[pb.WatchEventsResponse] = []
        self.news: queue.SimpleQueue[pb.WatchEventsResponse | None] = queue.SimpleQueue()

    def _known(self, method: str, model: str, context: grpc.ServicerContext) -> None:
        self.calls.append((method, model))
        if model == "tiny":
            return
        if model == "huge":
            error: errors.HostlerError = errors.ModelNeverFits("huge needs 900 GiB; the largest device has 8 GiB.")
        else:
            error = errors.ModelNotFound(f"No model is named {model!r}.")
        context.abort_with_status(errors.to_status(error))

    def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:  # noqa: N802
        return self.status

    def EnsureModel(self, request: Any, context: Any) -> Iterator[pb.EnsureModelResponse]:  # noqa: N802
        self._known("EnsureModel" if request.explicit else "implicit", request.model, context)
        loading = pb.MODEL_STATE_LOADING
        yield pb.EnsureModelResponse(progress=pb.EnsureProgress(state=loading, stage="spawn"))
        progress = pb.EnsureProgress(state=loading, stage="read", done_bytes=50, total_bytes=100, eta_ms=3000)
        yield pb.EnsureModelResponse(progress=progress)
        yield pb.EnsureModelResponse(ready=pb.Replica(id="w1", generation=7))

    def PlanModel(self, request: Any, context: Any) -> pb.PlanModelResponse:  # noqa: N802
        self._known("PlanModel", request.model, context)
        return self.plan

    def UnloadModel(self, request: Any, context: Any) -> pb.UnloadModelResponse:  # noqa: N802
        self._known("UnloadModel", request.model, context)
        return pb.UnloadModelResponse(num_unloaded=1)

    def SleepModel(self, request: Any, context: Any) -> pb.SleepModelResponse:  # noqa: N802
        self._known("SleepModel", request.model, context)
        return pb.SleepModelResponse(num_asleep=1)

    def WatchEvents(self, request: Any, context: Any) -> Iterator[pb.WatchEventsResponse]:  # noqa: N802
        """Past ones, then what the test puts into `news` until it puts None: then the orchestrator goes away."""
        yield from self.past[-request.max_past :]
        while not request.past_only and (event := self.news.get()) is not None:
            yield event
        if not request.past_only:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    def PinModel(self, request: Any, context: Any) -> pb.PinModelResponse:  # noqa: N802
        self._known("PinModel", request.model, context)
        self.pinned[request.model] = request.pinned
        return pb.PinModelResponse()


class FakeServer:
    """A run directory with a held lock, a config.json and a placement service: a live server to every command."""

    def __init__(self, port: int, config: dict[str, Any] | None = None) -> None:
        self.port = port
        self.placement = FakePlacement()
        self.run_dir = rundir.create(port)
        self.run_dir.config.write_text(json.dumps(config or {"host": "127.0.0.1"}))
        self._lock = self.run_dir.lock.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        pb_grpc.add_PlacementServiceServicer_to_server(self.placement, self._server)
        self._server.add_insecure_port(self.run_dir.orchestrator_target)
        self._server.start()

    def lose_orchestrator(self) -> None:
        self._server.stop(None).wait(5)

    def close(self) -> None:
        self.lose_orchestrator()
        self._lock.close()


Answer = Callable[[dict[str, Any]], list[bytes]]


@dataclass
class FakeHttp:
    """An OpenAI-compatible server: `answer` maps a request's body to the lines of the reply."""

    answer: Answer
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    models: tuple[dict[str, Any], ...] = ({"id": "tiny"}, {"id": "other"})
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, [json.dumps({"data": fake.models}).encode()])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fake.seen.append((self.headers.get("authorization", ""), body))
                self.reply(fake.status, fake.answer(body))

            def reply(self, status: int, pieces: list[bytes]) -> None:
                self.send_response(status)
                for name, value in fake.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for piece in pieces:
                        self.wfile.write(piece)
                        self.wfile.flush()
                except (BrokenPipeError, ConnectionResetError):
                    fake.closed.set()

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def sse(*pieces: str, reasoning: str = "", usage: int | None = None, done: bool = True) -> list[bytes]:
    """Return a chat completion stream that says `pieces`."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": reasoning}] if reasoning else []
    deltas += [{"content": piece} for piece in pieces]
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if usage is not None:
        chunks.append({"choices": [], "usage": {"completion_tokens": usage}})
    lines = [b": ping\n\n", *(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks)]
    return [*lines, b"data: [DONE]\n\n"] if done else lines[:-1]


class News:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.texts: list[str] = []

    def say(self, event: str, text: str, tone: str = "", **fields: Any) -> None:
        self.events.append(event)
        self.texts.append(text)

    def progress(self, model: str, progress: Any) -> None: ...

    def finish(self, model: str) -> None: ...

    def close(self) -> None: ...
