"""A Ray cluster of several machines on one: each node has an address of its own in 127.0.0.0/8.

Above: the node journeys. Below: `deploy/ray-cluster/start.sh`, as an operator runs it. Nodes have no HOSTLER_RUN_DIR,
so a server that stops leaves them alone; the fixture ends them, by pid.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from .server import ROOT, ServerFailed, wait_until

START = ROOT / "deploy" / "ray-cluster" / "start.sh"
STARTED_WITHIN_S = 60.0
_MARK = "HOSTLER_TEST_CLUSTER"


def _free_port() -> int:
    """Return a port for the control plane: below those that Ray hands to its workers."""
    for port in random.sample(range(6400, 10000), 50):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.2", port))
            return port
    raise ServerFailed("no free port for Ray's control plane")


class Cluster:
    """The nodes that were started, by name; the head is called "head" and stands at 127.0.0.2."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hn-", dir="/tmp"))
        self.token = secrets.token_hex(32)
        self.port = _free_port()
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        """What `hostler serve --ray-address` is given."""
        return f"127.0.0.2:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every node, and of the server that joins them."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_preload_python_modules": "json",  # The scripted engine needs no torch.
            "HOSTLER_RAY_PORT": str(self.port),
            "HOSTLER_MODELS_DIR": str(self.directory / "models"),
            _MARK: self.directory.name,
        }

    def arguments(self, name: str, address: str) -> list[str]:
        """Return what `start.sh` is given for the next node."""
        temp_dir = f"--temp-dir={self.directory}"
        return ["join", self.address, address, name] if self._nodes else ["head", address, temp_dir]

    def start(self, name: str, address: str) -> None:
        """Start a node and wait until its raylet runs; the first is the head.

        One after the other: nodes of one machine share a directory, and would take each other's socket names.
        """
        arguments = self.arguments(name, address)
        with open(self.directory / f"{name}.log", "ab") as log:
            self._nodes[name] = subprocess.Popen(
                [str(START), *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait(name)

    def _wait(self, name: str) -> None:
        log = self.directory / f"{name}.log"

        def started() -> bool:
            if self._nodes[name].poll() is not None:
                raise ServerFailed(f"the node {name} ended:\n{log.read_text(errors='replace')}")
            return b"Ray runtime started" in log.read_bytes()

        wait_until(started, STARTED_WITHIN_S, f"the node {name}", every_s=0.1)

    def raylet(self, name: str) -> psutil.Process:
        """Return a node's raylet."""
        children = psutil.Process(self._nodes[name].pid).children(recursive=True)
        return next(process for process in children if process.name() == "raylet")

    def lose(self, name: str) -> None:
        """Kill a node's raylet at once, as if its machine had gone; its workers end with it."""
        self.raylet(name).kill()
        (self.directory / f"{name}.log").unlink()

    def processes(self) -> list[psutil.Process]:
        """Return every living process of the cluster."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_MARK) == self.directory.name and process.pid != os.getpid():
                    found.append(process)
        return found

    def close(self) -> None:
        """End everything."""
        roots = [psutil.Process(node.pid) for node in self._nodes.values() if node.poll() is None]
        family = {p for root in roots for p in (root, *root.children(recursive=True))} | set(self.processes())
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        for node in self._nodes.values():
            node.wait(10)
        shutil.rmtree(self.directory, ignore_errors=True)

    def log_sections(self) -> list[tuple[str, str]]:
        """Return what every node printed."""
        return [(path.name, path.read_text(errors="replace")[-4000:]) for path in sorted(self.directory.glob("*.log"))]


@pytest.fixture
def ray_cluster() -> Iterator[Cluster]:
    """A cluster without nodes; whatever a test starts is gone after it."""
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.close()
