"""What a measured server is: a small protocol, the model that all of them serve, and a server that is a process tree.

Above: the peers, one module each. To add one: a class with the members of `Peer`, and a line in `lineup.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests.journeys.server import ROOT

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
        """Its name in notices."""

    @property
    def short(self) -> str:
        """Its name as a column of the table, in goals, and for `--peers`."""

    @property
    def max_streams(self) -> int | None:
        """The most streams at once that make sense for it; None for any number."""

    @property
    def start_within_s(self) -> float:
        """Seconds from the command to its first reply after which it counts as failed."""

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decode step must read at the least; known after `prepare`."""

    def prepare(self, say: Callable[[str], None]) -> None:
        """Install what is missing, once. Raises Skip when it cannot run here."""

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

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on disk: what one decode step must read at least once."""
        return sum(file.stat().st_size for file in self._files())

    @property
    def int8_bytes(self) -> int:
        """Bytes with every matrix in int8 and a float32 scale for each of its rows; the rest as on disk."""
        total = 0
        for file in self._files():
            for shape, num_bytes in tensors_of(file):
                total += shape[0] * shape[1] + 4 * shape[0] if len(shape) == 2 else num_bytes
        return total

    @property
    def fingerprint(self) -> str:
        """A short name of these very files, for what is derived from them."""
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._files()]
        return hashlib.sha256(repr((str(self.path), facts)).encode()).hexdigest()[:12]


def tensors_of(safetensors: Path) -> list[tuple[tuple[int, ...], int]]:
    """Return each tensor's shape and bytes, read from the file's header alone."""
    with safetensors.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    return [(tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]) for entry in tensors]


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
