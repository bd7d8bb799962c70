"""What a measured server is: a small protocol, hostler behind it, and a server that is one process tree.

To add a peer (vLLM, llama.cpp): a class with the four things of `Peer`, and one line in `__main__.PEERS`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests.journeys.server import ROOT, Server, Servers

PULL_WITHIN_S = 900


class Skip(Exception):
    """A peer cannot be measured here; the message says why."""


class Running(Protocol):
    """A started server."""

    @property
    def url(self) -> str:
        """Root of its HTTP server."""

    @property
    def has_ended(self) -> bool:
        """True when its main process is gone."""

    def processes(self) -> list[psutil.Process]:
        """Return all of its processes."""

    def output(self) -> str:
        """Return the tail of what it printed."""

    def stop(self) -> None:
        """End it, and whatever it started."""


class Peer(Protocol):
    """A kind of server that can be measured."""

    @property
    def name(self) -> str:
        """Its name in the table."""

    @property
    def short(self) -> str:
        """Its name as a key in the results."""

    def prepare(self, say: Callable[[str], None]) -> None:
        """Install what is missing, once. Raises Skip when that is impossible."""

    def start(self) -> Running:
        """Start it; returns at once, before it answers."""

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Return a streaming greedy chat request that gives exactly `max_tokens` tokens where possible."""


def memory_bytes(processes: list[psutil.Process]) -> int:
    """Return the resident memory of the processes; pages that they share are counted once (PSS) where known."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            info = process.memory_full_info()
            total += getattr(info, "pss", 0) or info.rss
    return total


@dataclass(frozen=True, slots=True)
class StoredModel:
    """The model that all peers serve."""

    name: str
    path: Path

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on disk: what one decode step must read at least once."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))


def pull(name: str, say: Callable[[str], None]) -> StoredModel:
    """Bring the model into the store if it is not there, and return where it lies.

    Raises:
        Skip: it could not be had.
    """
    command = [sys.executable, "-m", "orchestrator.store", "pull", name, "--json"]
    say(f"model {name}: looking in the store")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PULL_WITHIN_S, check=False)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    last = lines[-1] if lines else {"message": result.stderr[-500:]}
    if last.get("stage") != "done":
        raise Skip(f"the model {name} could not be pulled: {last.get('message')}")
    return StoredModel(name, Path(last["path"]))


class RunningHostler:
    """hostler, started as users start it."""

    def __init__(self, server: Server, servers: Servers) -> None:
        self._server = server
        self._servers = servers

    @property
    def url(self) -> str:
        """Root of its HTTP server."""
        return self._server.url

    @property
    def has_ended(self) -> bool:
        """True when the supervisor is gone."""
        return self._server.process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Return the supervisor, gateways, orchestrator, Ray and workers."""
        return self._server.processes()

    def output(self) -> str:
        """Return the tail of all its logs."""
        return "\n".join(f"--- {title}\n{text}" for title, text in self._server.log_sections())

    def stop(self) -> None:
        """Stop it and remove its run directory."""
        self._servers.stop_all()


class Hostler:
    """`hostler serve` with one model, bf16."""

    name = "hostler"
    short = "hostler"

    def __init__(self, model: StoredModel, extra_config: str = "") -> None:
        self._model = model
        self._config = (
            f"models:\n  - name: {model.name}\n    dtype: bfloat16\n    preload: true\n    pinned: true\n{extra_config}"
        )

    def prepare(self, say: Callable[[str], None]) -> None:
        """Nothing to do: this checkout's own environment runs it."""

    def start(self) -> Running:
        """Start it; returns at once."""
        servers = Servers()
        return RunningHostler(servers(config=self._config, wait_ready=False), servers)

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Return a chat request."""
        return {
            "model": self._model.name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }


@dataclass
class TreeServer:
    """A server that is one process and its descendants."""

    process: subprocess.Popen[bytes]
    port: int
    directory: Path

    @classmethod
    def spawn(cls, command: list[str], environment: Mapping[str, str], port: int, directory: Path) -> TreeServer:
        """Start `command`, its output going to a file in `directory`, which `stop` removes."""
        with (directory / "output").open("wb") as output:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(process, port, directory)

    @property
    def url(self) -> str:
        """Root of its HTTP server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def has_ended(self) -> bool:
        """True when the main process is gone."""
        return self.process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Return the process and its descendants."""
        with contextlib.suppress(psutil.Error):
            main = psutil.Process(self.process.pid)
            return [main, *main.children(recursive=True)]
        return []

    def output(self) -> str:
        """Return the tail of what it printed."""
        return (self.directory / "output").read_text(encoding="utf-8", errors="replace")[-4000:]

    def stop(self) -> None:
        """Terminate the tree, then kill what is left of it."""
        tree = self.processes()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(10)
        shutil.rmtree(self.directory, ignore_errors=True)
