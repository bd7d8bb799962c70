"""`hostler serve` as a process of its own, with dummy children: what it prints, how it ends, what it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostler.config import HostlerConfig, ModelConfig
from hostler.lifecycle.v1 import lifecycle_pb2

from cli import janitor, log_files, serve
from cli.placement import Progress
from cli.report import LineReporter
from cli.startup import curl_line

DUMMY_SERVER = Path(__file__).with_name("dummy_server.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """One `hostler serve` and its output."""

    def __init__(self, place: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.output = place / "out"
        command = [sys.executable, str(DUMMY_SERVER), str(place / "journal"), "serve", "--port", str(self.port), *args]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )

    @property
    def run_dir(self) -> Path:
        return Path(os.environ["HOSTLER_RUN_DIR"], str(self.port))

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def wait_for(self, word: str, within_s: float = 15.0) -> str:
        wait(lambda: word in self.text() or self.process.poll() is not None, within_s, self.text)
        assert word in self.text(), self.text()
        return self.text()

    def processes(self) -> set[janitor.Process]:
        return janitor.find(janitor.of_earlier_runs(str(self.run_dir)))

    def pid(self, *words: str) -> int:
        """Return the one process of this server whose command line has all the words."""
        (found,) = [
            p.pid for p in self.processes() if all(w in Path(f"/proc/{p.pid}/cmdline").read_text() for w in words)
        ]
        return found


def wait(condition: Callable[[], bool], within_s: float, explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def run(*args: str, **options: Any) -> Served:
        started.append(Served(place, *args, **options))
        return started[-1]

    yield run
    for served in started:
        served.process.kill()
        served.process.wait()
        janitor.clear(janitor.of_earlier_runs(str(served.run_dir)), 0.0)


def test_a_start_shows_progress_and_ends_with_a_line_to_paste(start: Callable[..., Served]) -> None:
    served = start("tiny")
    text = served.wait_for("Ctrl-C stops")
    assert "device   cpu  Some CPU, 8.0 GiB to use" in text
    assert "✓ tiny is ready" in text
    assert f"Serving on http://127.0.0.1:{served.port}/v1" in text
    assert f"curl http://127.0.0.1:{served.port}/v1/chat/completions -H 'Content-Type: application/json' -d '{{" in text
    assert "Authorization" not in text
    assert served.run_dir.joinpath("config.json").stat().st_mode & 0o777 == 0o600
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(15) == 0
    assert "draining (3 running)…" in served.text()
    assert served.processes() == set()


def test_a_model_that_fails_is_explained_and_the_server_goes_on(start: Callable[..., Served]) -> None:
    served = start("nope", env={"HOSTLER_API_KEY": "a-secret-key"})
    text = served.wait_for("Ctrl-C stops")
    assert "✗ nope could not be loaded: No model is named 'nope'." in text
    assert 'Authorization: Bearer $HOSTLER_API_KEY"' in text
    assert "a-secret-key" not in text
    assert served.process.poll() is None
    environment = Path(f"/proc/{served.pid('gateway')}/environ").read_bytes()
    assert b"a-secret-key" not in environment
    served.process.terminate()
    assert served.process.wait(15) == 0


def test_a_model_that_waits_for_its_first_request_is_looked_over_at_the_start(
    start: Callable[..., Served], place: Path
) -> None:
    (place / "hostler.yaml").write_text("models: [{name: nope}, {name: tiny}, {name: huge}]")
    text = start("--config", str(place / "hostler.yaml")).wait_for("Ctrl-C stops")
    assert "✗ nope will not load: No model is named 'nope'." in text
    assert "✗ huge will not load: huge needs 900 GiB; the largest device has 8 GiB." in text
    assert "tiny will not load" not in text
    assert '"model": "tiny"' in text[text.index("curl") :], "what is proposed is what will load"


def test_a_server_whose_models_all_will_not_load_proposes_to_mend_that(
    start: Callable[..., Served], place: Path
) -> None:
    (place / "hostler.yaml").write_text("models: [{name: nope}, {name: huge}]")
    served = start("--config", str(place / "hostler.yaml"))
    text = served.wait_for(f"No model can be loaded. Mend the configuration, then: hostler reload --port {served.port}")
    assert "curl" not in text


def test_json_logs_are_json_alone(start: Callable[..., Served]) -> None:
    served = start("tiny", "--json-logs")
    served.wait_for('"event": "hint"')
    events = {value["event"]: value for value in map(json.loads, served.text().splitlines())}
    assert events["model_ready"]["model"] == "tiny"
    assert events["serving"]["url"] == f"http://127.0.0.1:{served.port}"


def test_children_that_die_come_back_and_the_port_stays_open(start: Callable[..., Served]) -> None:
    served = start("tiny")
    served.wait_for("Ctrl-C stops")
    gateway = served.pid("gateway")
    os.kill(gateway, signal.SIGKILL)
    # Not before: a process that is being killed may still accept, and then resets.
    served.wait_for("gateway-0 ended (signal 9); starting it again in 0.2 s")
    (ended,) = json.loads((served.run_dir / "restarts.json").read_text()).values()
    assert (ended["process"], ended["exit_code"], ended["num_in_a_row"]) == ("gateway-0", -9, 1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert served.pid("gateway") != gateway
    assert served.process.poll() is None


def test_nothing_outlives_a_serve_that_is_killed_and_the_next_one_starts(start: Callable[..., Served]) -> None:
    served = start("tiny")
    served.wait_for("Ctrl-C stops")
    pids = [process.pid for process in served.processes()]
    assert len(pids) == 4
    served.process.kill()
    served.process.wait()
    wait(lambda: len(served.processes()) <= 1, 3.0)  # Ray has a grace; the rest is gone at once
    # A new one does not wait for the janitor of the old one.
    again = subprocess.Popen([*served.process.args, "--json-logs"], stdout=subprocess.PIPE, text=True)  # type: ignore[misc]
    try:
        for line in again.stdout or ():
            if '"serving"' in line:
                break
        assert not any(process.pid in pids for process in served.processes())
    finally:
        again.terminate()
        assert again.wait(15) == 0
        if again.stdout:
            again.stdout.close()
    assert served.processes() == set()


def test_a_port_that_another_program_has_is_named(start: Callable[..., Served], place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        served = start("tiny", "--port", str(port))
        assert served.process.wait(10) == 1
    assert f"port {port} is taken by another program; choose another with --port" in served.text()


def test_the_listening_socket_bounds_what_a_stalled_reader_holds() -> None:
    listener = serve.bind("localhost", free_port())
    try:
        assert listener.family == socket.AF_INET
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * serve.SEND_BUFFER_BYTES
    finally:
        listener.close()


def test_the_unix_socket_is_this_users_alone_and_takes_the_place_of_a_dead_one(place: Path) -> None:
    path = place / "gateway.sock"
    serve.bind_unix(path).close()  # as after a kill: the file stays
    listener = serve.bind_unix(path)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    finally:
        listener.close()


def test_gateways_inherit_the_public_socket_and_the_unix_one(place: Path) -> None:
    from hostler.rundir import RunDir

    children = serve.children(HostlerConfig(gateways=1), RunDir(place), 5, {}, 6, 7)
    assert children[2].command[-6:] == ("--fd", "5", "--public-fd", "6", "--unix-fd", "7")
    assert children[2].pass_fds == (5, 6, 7)


def test_the_processes_are_those_of_the_design(place: Path) -> None:
    from hostler.rundir import RunDir

    config = HostlerConfig(gateways=3, drain_s=7)
    children = serve.children(config, RunDir(place), 5, {})
    assert [child.name for child in children] == ["ray_head", "orchestrator", "gateway-0", "gateway-1", "gateway-2"]
    assert [child.stop_rank for child in children] == [2, 1, 0, 0, 0]
    assert children[0].takes_along == ("orchestrator",)
    assert children[2].command[1:] == ("-P", "-m", "gateway", "--run-dir", str(place), "--fd", "5")
    assert children[2].pass_fds == (5,)
    assert children[2].stop_grace_s > config.drain_s


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:9"), ("0.0.0.0", "http://127.0.0.1:9"), ("::1", "http://[::1]:9")]
)
def test_the_curl_line_can_be_pasted(host: str, url: str) -> None:
    config = HostlerConfig(host=host, port=9, models=(ModelConfig(name="it"),))
    line = curl_line(config, "it")
    assert "\n" not in line
    assert line.startswith(f"curl {url}/v1/chat/completions ")
    body = json.loads(line.partition("-d '")[2].removesuffix("'"))
    assert (body["model"], body["temperature"]) == ("it", 0)
    assert "capital of France" in body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("engine", "path", "field"),
    [
        (lifecycle_pb2.ENGINE_KIND_SPEECH, "audio/speech", "input"),
        (lifecycle_pb2.ENGINE_KIND_EMBEDDING, "embeddings", "input"),
        (lifecycle_pb2.ENGINE_KIND_RERANK, "rerank", "documents"),
        (lifecycle_pb2.ENGINE_KIND_TEXT, "chat/completions", "messages"),
    ],
)
def test_the_curl_line_asks_a_model_for_what_it_is_for(
    engine: lifecycle_pb2.EngineKind.ValueType, path: str, field: str
) -> None:
    line = curl_line(HostlerConfig(port=9, models=(ModelConfig(name="it"),)), "it", engine)
    assert line.startswith(f"curl http://127.0.0.1:9/v1/{path} ")
    assert field in json.loads(line.partition("-d '")[2].rpartition("'")[0])


def test_the_curl_line_sends_a_recording_to_a_model_that_hears() -> None:
    config = HostlerConfig(port=9, models=(ModelConfig(name="it"),))
    line = curl_line(config, "it", lifecycle_pb2.ENGINE_KIND_TRANSCRIPTION)
    assert line == "curl http://127.0.0.1:9/v1/audio/transcriptions -F model=it -F file=@recording.wav"


def test_plain_progress_is_at_most_a_line_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    reporter = LineReporter(False, clock=lambda: now[0])
    for step in range(101):
        now[0] = step * 0.05
        reporter.progress("tiny", Progress("download", step, 100))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[1] == "tiny: downloading 20 % of 0 MB"


def test_a_log_that_has_grown_large_is_made_small_while_the_server_runs(start: Callable[..., Served]) -> None:
    served = start("tiny", env={"LOOK_AT_LOGS_EVERY_S": "0.1"})
    served.wait_for("Ctrl-C stops")
    log = served.run_dir / "logs" / "gateway-0.log"
    os.truncate(log, log_files.MAX_BYTES + 1)
    wait(lambda: log.stat().st_size == 0, 10)
    assert log.with_suffix(".log.1").stat().st_size == log_files.MAX_BYTES + 1
