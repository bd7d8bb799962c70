"""The screen of `hostler serve`: start-up progress, news about processes, the drain at the end.

Above stands `cli.serve`; below, `cli.supervisor`, `cli.placement` and `cli.report`. Imported after the children
have been started, because grpc and rich take longer to import than the children may wait.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hostler import __version__, errors
from hostler.config import DEFAULT_PORT, HostlerConfig, ModelConfig
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.rundir import RunDir
from hostler.words import size

from cli import log_files, notify, outlook, placement, report, restarts, servers
from cli.placement import Progress, Ready
from cli.reloading import Reloader
from cli.supervisor import Event, Supervisor

_GATEWAY_DEADLINE_S = 20.0
_LOGS_EVERY_S = 20.0


class Screen:
    """Runs in the supervisor's loop, in the main thread, for the life of the server."""

    def __init__(
        self,
        config: HostlerConfig,
        path: Path | None,
        run_dir: RunDir,
        supervisor: Supervisor,
        listener: socket.socket,
        door: socket.socket | None,
        *,
        as_json: bool,
        verbose: bool,
    ) -> None:
        self._config = config
        self._path = path
        self._run_dir = run_dir
        self._supervisor = supervisor
        self._listener = listener
        self._door = door
        self.unix: socket.socket | None = None
        self._verbose = verbose
        self._report = report.make(as_json)
        self._num_signals = 0
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, signals: list[Any], early: list[int], started_at: float, reloader: Reloader) -> None:
        """Show the start, reload when asked, wait for a signal, drain. Never raises for what children do."""
        loop = asyncio.get_running_loop()
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        if early:
            self._on_signal()
        self._supervisor.on_event = self._on_event
        self._supervisor.watch()
        self._head()
        if self._verbose:
            self._begin(self._follow_logs())
        self._begin(self._start_up(started_at))
        self._begin(self._keep_logs_small())
        reloader.on_begin, reloader.on_end = notify.reloading, notify.reloaded
        self._begin(reloader.run(self._report))
        attending = asyncio.create_task(notify.attend(self._wait_for_gateway))  # through the drain: it may take long
        await self._stop.wait()
        notify.stopping(self._supervisor.longest_stop_s)
        await self._drain()
        attending.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._stop.set()
        if self._num_signals == 2:
            self._report.say("forced", "stopping at once", "warn")
            self._supervisor.force()

    def _on_event(self, event: Event) -> None:
        if event.kind == "ended":
            restarts.note(self._run_dir, event)
            code = event.exit_code or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            text = f"{event.child} ended ({how}); starting it again in {event.restart_in_s:.1f} s"
            self._report.say("process_ended", text, "warn", process=event.child, exit_code=code)
            if event.num_short_lives in (2, 5) or event.num_short_lives % 20 == 0:
                log = self._run_dir.logs / f"{event.child}.log"
                for line in log_tail(log):
                    self._report.say("log", f"  {line}", "dim", process=event.child)
                self._report.say("log_file", f"  its whole log: {log}", "dim", process=event.child, path=str(log))
        elif event.kind == "killed":
            self._report.say(
                "process_killed", f"{event.child} did not stop in time; killed", "warn", process=event.child
            )

    def _head(self) -> None:
        say = self._report.say
        say("starting", f"hostler {__version__}", "head", version=__version__, port=self._config.port)
        if self._path is not None:
            say("config", f"  config   {self._path}", path=str(self._path))
        for model in self._config.models:
            source = f"  from {model.source}" if model.source and model.source != model.name else ""
            note = "" if model.preload else "  (loads on its first request)"
            say("model", f"  model    {model.name}{source}{note}", model=model.name, preload=model.preload)

    async def _start_up(self, started_at: float) -> None:
        wanted = [model for model in self._config.models if model.preload]
        for model in wanted:
            self._report.progress(model.name, Progress("start"))
        gateway = asyncio.create_task(self._wait_for_gateway())
        devices = asyncio.create_task(self._show_devices())
        others = asyncio.create_task(self._look_over([model for model in self._config.models if not model.preload]))
        try:
            ready = await asyncio.gather(*(self._load(model) for model in wanted))
            await devices
            hopeless = await others
            if not await gateway:
                log = self._run_dir.logs / "gateway-0.log"
                self._report.say("gateway_silent", f"the gateway does not answer; see {log}", "bad")
        finally:
            gateway.cancel()
            devices.cancel()
            others.cancel()
        can_answer = [m for m, is_ready in zip(wanted, ready, strict=True) if is_ready]
        engines = await self._engines()
        worth_trying = [m for m in (*can_answer, *self._config.models) if m.name not in hopeless]
        self._banner(can_answer, wanted, worth_trying, started_at, engines)
        if self._config.public.enabled:
            from cli.outside import show_outside

            text = (lifecycle_pb2.ENGINE_KIND_TEXT, lifecycle_pb2.ENGINE_KIND_SCRIPTED)
            chatting = [model.name for model in can_answer if engines.get(model.name) in text]
            await show_outside(self._config, self._run_dir, chatting, self._report)

    async def _show_devices(self) -> None:
        status = await placement.wait_for_status(self._run_dir)
        for device in status.devices:
            budget = f", {size(device.budget_bytes)} to use" if device.budget_bytes else ""
            name = f"  {device.name}" if device.name else ""
            fields: dict[str, Any] = {"device": device.id, "name": device.name, "budget_bytes": device.budget_bytes}
            self._report.say("device", f"  device   {device.id}{name}{budget}", **fields)

    async def _load(self, model: ModelConfig) -> bool:
        started = time.monotonic()
        try:
            async for event in placement.load_until_known(self._run_dir, model.name):
                if isinstance(event, Ready):
                    self._report.finish(model.name)
                    took_s = time.monotonic() - started
                    fields = {"model": model.name, "took_s": round(took_s, 2)}
                    self._report.say("model_ready", f"  ✓ {model.name} is ready ({took_s:.1f} s)", "good", **fields)
                    return True
                self._report.progress(model.name, event)
        except errors.HostlerError as error:
            self._report.finish(model.name)
            text = f"  ✗ {model.name} could not be loaded: {' '.join(error.message.split())}"
            self._report.say("model_failed", text, "bad", model=model.name, reason=error.reason)
        return False

    async def _look_over(self, models: Sequence[ModelConfig]) -> set[str]:
        """Say which models could not be loaded as they are configured; return their names."""
        await placement.wait_for_status(self._run_dir)
        found = await outlook.hopeless(self._run_dir, models)
        for name, error in found.items():
            text = f"  ✗ {outlook.in_words(name, error)}"
            self._report.say("model_failed", text, "bad", model=name, reason=error.reason)
        return set(found)

    async def _wait_for_gateway(self) -> bool:
        url = servers.base_url(self._config.host, self._config.port).removeprefix("http://")
        host = url.rpartition(":")[0].strip("[]")
        request = f"GET /health HTTP/1.1\r\nHost: {url}\r\nConnection: close\r\n\r\n".encode()
        deadline = time.monotonic() + _GATEWAY_DEADLINE_S
        while (left_s := deadline - time.monotonic()) > 0:
            # A connection waits in the socket's backlog until a gateway accepts it; one that dies resets it.
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(left_s):
                    reader, writer = await asyncio.open_connection(host, self._config.port)
                    try:
                        writer.write(request)
                        await writer.drain()
                        if (await reader.readline()).startswith(b"HTTP/1.1 "):
                            return True
                    finally:
                        writer.close()
            await asyncio.sleep(0.1)
        return False

    async def _engines(self) -> dict[str, lifecycle_pb2.EngineKind.ValueType]:
        """Return what each model is for, as far as it is known."""
        try:
            async with placement.connect(self._run_dir) as client:
                return {route.name: route.engine for route in (await client.status()).models}
        except errors.HostlerError:
            return {}

    def _banner(
        self,
        ready: list[ModelConfig],
        wanted: list[ModelConfig],
        worth_trying: list[ModelConfig],
        started_at: float,
        engines: Mapping[str, lifecycle_pb2.EngineKind.ValueType],
    ) -> None:
        say = self._report.say
        url = servers.base_url(self._config.host, self._config.port)
        elapsed_s = time.time() - started_at
        notify.serving(url, len(ready), len(wanted))
        if wanted and not ready:
            say(
                "serving",
                f"\nServing on {url}/v1, though no model is loaded (after {elapsed_s:.1f} s)",
                "warn",
                url=url,
            )
        else:
            fields = {"url": url, "elapsed_s": round(elapsed_s, 2)}
            say("serving", f"\nServing on {url}/v1 (ready after {elapsed_s:.1f} s)", "head", **fields)
        port = "" if self._config.port == DEFAULT_PORT else f" --port {self._config.port}"
        if not worth_trying:
            say("hint", f"\nNo model can be loaded. Mend the configuration, then: hostler reload{port}", "warn")
            return
        model = worth_trying[0].name
        line = curl_line(self._config, model, engines.get(model, lifecycle_pb2.ENGINE_KIND_UNSPECIFIED))
        say("try", f"\n{line}\n", command=line)
        say("hint", f"hostler chat{port} talks to it, hostler ps{port} shows what runs. Ctrl-C stops.", "dim")

    async def _follow_logs(self) -> None:
        """Print what the children log, line by line. Reading a local file does not block for long."""
        tails: dict[Path, log_files.Tail] = {}
        while True:
            for path in sorted(self._run_dir.logs.glob("*.log")):
                tail = tails.setdefault(path, log_files.Tail(log_files.LogFile(path.stem, path)))
                for line in tail.news():
                    self._report.say("log", f"{path.stem}: {line}", "dim", process=path.stem)
            await asyncio.sleep(0.25)

    async def _keep_logs_small(self) -> None:
        while True:
            await asyncio.sleep(_LOGS_EVERY_S)
            await asyncio.to_thread(log_files.keep_small, self._run_dir)

    async def _drain(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._report.close()
        for listener in (self._listener, self._door, self.unix):
            if listener is not None:  # a connection is refused rather than left to wait
                listener.close()
        started = time.monotonic()
        num_running = await self._count_running()
        self._report.say(
            "draining", f"\ndraining ({num_running} running)… Ctrl-C again stops at once", num_running=num_running
        )
        await self._supervisor.stop()
        self._report.say("stopped", f"stopped after {time.monotonic() - started:.1f} s", "dim")

    async def _count_running(self) -> int:
        if self._num_signals > 1 or not self._run_dir.orchestrator_socket.exists():
            return 0
        try:
            async with placement.connect(self._run_dir) as client:
                status = await client.status(timeout_s=0.5)
        except errors.HostlerError:
            return 0
        return sum(replica.worker.num_running for replica in status.replicas)


_CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}
# What is asked of a model: path, fields of the body, and what is done with the reply.
_ASKED: dict[lifecycle_pb2.EngineKind.ValueType, tuple[str, dict[str, Any], str]] = {
    lifecycle_pb2.ENGINE_KIND_EMBEDDING: ("embeddings", {"input": "All aboard!"}, ""),
    lifecycle_pb2.ENGINE_KIND_RERANK: ("rerank", {"query": "a train", "documents": ["An engine.", "A cat."]}, ""),
    lifecycle_pb2.ENGINE_KIND_TRANSCRIPTION: ("audio/transcriptions", {}, ""),
    lifecycle_pb2.ENGINE_KIND_SPEECH: ("audio/speech", {"input": "All aboard!", "voice": "default"}, " -o speech.mp3"),
}


def curl_line(
    config: HostlerConfig,
    model: str,
    engine: lifecycle_pb2.EngineKind.ValueType = lifecycle_pb2.ENGINE_KIND_UNSPECIFIED,
) -> str:
    """Return a command to paste that asks `model` for what it is for; the key stays in the environment."""
    path, fields, then = _ASKED.get(engine, ("chat/completions", _CHAT, ""))
    key = ' -H "Authorization: Bearer $HOSTLER_API_KEY"' if config.demands_key else ""
    url = f"{servers.base_url(config.host, config.port)}/v1/{path}"
    if engine == lifecycle_pb2.ENGINE_KIND_TRANSCRIPTION:  # a form, not JSON
        return f"curl {url}{key} -F model={shlex.quote(model)} -F file=@recording.wav"
    body = shlex.quote(json.dumps({"model": model, **fields}))
    return f"curl {url} -H 'Content-Type: application/json'{key} -d {body}{then}"


def log_tail(path: Path, num_lines: int = 3, num_bytes: int = 4096) -> list[str]:
    """Return the last lines of a log, for explaining why a process keeps ending."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - num_bytes))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-num_lines:]
