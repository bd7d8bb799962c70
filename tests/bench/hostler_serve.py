"""hostler as a measured server, started as users start it.

Above: the lineup. Below: the journeys' server harness.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Literal

import psutil

from tests.journeys.server import ROOT, Server, Servers

from .environments import Say
from .load import first_start_s
from .peers import Running, StoredModel
from .results import StepPart

Weights = Literal["bf16", "int8"]


class RunningHostler:
    """A started hostler: the supervisor and all that belongs to it."""

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
    """`hostler serve` with one model, in bf16, or with its matrices quantized to int8."""

    max_streams = None
    start_within_s = 180.0

    def __init__(self, model: StoredModel, weights: Weights = "bf16") -> None:
        self._model = model
        self._weights: Weights = weights

    @property
    def name(self) -> str:
        """Its name in notices."""
        return f"hostler ({self._weights})"

    @property
    def short(self) -> str:
        """Its name as a column."""
        return "hostler" if self._weights == "bf16" else f"hostler-{self._weights}"

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decode step reads at the least."""
        return self._model.weight_bytes if self._weights == "bf16" else self._model.int8_bytes

    @property
    def config(self) -> str:
        """The text of its hostler.yaml."""
        lines = [f"- name: {self._model.name}", "  dtype: bfloat16", "  preload: true", "  pinned: true"]
        quantize = [f"  quantize: {self._weights}"] if self._weights != "bf16" else []
        return "\n".join(["models:", *lines, *quantize, ""])

    def prepare(self, say: Say) -> None:
        """Start it once with this model: its kernels are proved then, if they have not been; see `VllmServe.prepare`.

        Raises:
            Skip: it does not start.
        """
        spent_s = first_start_s(self)
        say(f"{self.name}: a start that does not count took {spent_s:.1f} s")

    def start(self) -> Running:
        """Start it; returns at once."""
        servers = Servers()
        return RunningHostler(servers(config=self.config, wait_ready=False), servers)

    def step_parts(self) -> tuple[StepPart, ...]:
        """Return where a decode step of one row and of sixteen spends its time, measured in an engine of its own."""
        quantize = ["--set", f"quantize={self._weights}"] if self._weights != "bf16" else []
        command = [sys.executable, "-m", "tests.bench.engine", "--rows", "1,16", "--steps", "48", "--json", *quantize]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            return ()
        figures = json.loads(done.stdout.strip().splitlines()[-1])["decode"]
        return tuple(StepPart(name, ms, item["rows"]) for item in figures for name, ms in item["parts_ms"].items())

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
