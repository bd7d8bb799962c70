"""`hostler doctor`: each check says what is wrong when it is, and what to do; none cries wolf."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hostler import rundir
from typer.testing import CliRunner

from cli.doctor import listening, machine, report, servers_here
from cli.doctor.finding import Finding
from cli.doctor.listening import Listener
from cli.main import app
from tests.cli.fakes import FakeHttp, FakeServer, sse

STATES = {"ok", "bad", "note"}


def states(findings: list[Finding]) -> list[str]:
    return [finding.state for finding in findings]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user of his own, with no network to ask."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOSTLER_MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.delenv("HOSTLER_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_finding_has_a_state_and_what_is_bad_has_advice(quiet: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(result.stdout)
    assert {finding["state"] for finding in told["findings"]} <= STATES
    assert all(finding["advice"] for finding in told["findings"] if finding["state"] == "bad")
    assert told["healthy"] is (result.exit_code == 0)
    names = {finding["name"] for finding in told["findings"]}
    assert {"Python", "packages", "GPU", "config", "models", "disk", "port", "Ray", "Hub", "clock"} <= names


def test_a_broken_configuration_is_told_with_the_near_name_and_fails(quiet: Path) -> None:
    (quiet / "hostler.yaml").write_text("prot: 9000\n")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "✗ config: prot: unknown key; did you mean 'port'?" in result.stdout
    assert "to mend" in result.stdout


def test_a_key_that_others_may_read_is_found(quiet: Path) -> None:
    path = quiet / "hostler.yaml"
    path.write_text("api_key: correct-horse-battery\n")
    path.chmod(0o644)
    _, found = servers_here.configuration(path)
    assert (found[-1].state, found[-1].advice) == ("bad", f"chmod 600 {path}")
    path.chmod(0o600)
    assert states(servers_here.configuration(path)[1]) == ["ok"]


def test_an_old_python_is_refused() -> None:
    assert machine.python((3, 10)).state == "bad"
    assert machine.python((3, 12)).state == "ok"


@pytest.mark.parametrize(
    ("gpus", "cuda", "state"),
    [(0, "", "ok"), (2, "12.8", "ok"), (1, "", "bad"), (0, "12.8", "note"), (1, None, "note")],
)
def test_gpus_and_the_build_of_torch_must_go_together(gpus: int, cuda: str | None, state: str) -> None:
    assert machine.gpu(gpus, cuda).state == state


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    import importlib.metadata

    built_for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    assert (machine.torch_cuda() == "") is built_for_cpu
    assert "torch" not in sys.modules or machine.torch_cuda() == (sys.modules["torch"].version.cuda or "")


def test_a_models_directory_that_others_may_write_to_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "models"
    assert machine.models_directory(directory).state == "ok"
    directory.mkdir()
    directory.chmod(0o777)
    assert machine.models_directory(directory).advice == f"chmod go-w {directory}"
    directory.chmod(0o755)
    assert machine.models_directory(directory).state == "ok"


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": machine.GIB}
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free["bytes"]}))
    assert machine.disk(tmp_path / "not" / "there").state == "bad"
    free["bytes"] = 5 * machine.GIB
    assert machine.disk(tmp_path).state == "note"
    free["bytes"] = 500 * machine.GIB
    assert machine.disk(tmp_path).state == "ok"


def test_a_port_that_another_program_has_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        assert machine.port(number, is_ours=False).state == "bad"
        assert machine.port(number, is_ours=True).state == "ok"
        assert machine.ray(f"127.0.0.1:{number}").state == "ok"
    assert machine.port(number, is_ours=False).state == "ok"
    assert machine.ray(f"127.0.0.1:{number}").state == "bad"
    assert machine.ray("nonsense").state == "bad"


def test_a_clock_that_is_wrong_is_told_by_how_much() -> None:
    now = time.time()
    assert machine.clock(formatdate(now, usegmt=True), now).state == "ok"
    assert machine.clock(formatdate(now - 300, usegmt=True), now).detail in ("300 s fast", "301 s fast")
    assert machine.clock(formatdate(now + 300, usegmt=True), now).detail in ("300 s slow", "299 s slow")
    assert machine.clock(None, now).state == "note"


def test_a_hub_that_answers_gives_the_clock_and_one_that_does_not_stops_nothing() -> None:
    hub = FakeHttp(lambda body: [])
    try:
        found = machine.hub_and_clock({"HF_ENDPOINT": hub.url})
    finally:
        hub.close()
    assert [finding.name for finding in found] == ["Hub", "clock"]
    assert found[0].state == "ok"
    assert states(machine.hub_and_clock({"HF_ENDPOINT": "http://127.0.0.1:1"})) == ["note", "note"]
    assert states(machine.hub_and_clock({"HF_HUB_OFFLINE": "1"})) == ["note", "note"]


def test_doors_of_the_run_directory_that_stand_open_are_found(quiet: Path) -> None:
    run_dir = rundir.create(8123)
    run_dir.config.write_text("{}")
    run_dir.config.chmod(0o600)
    assert states(servers_here.run_directories()) == ["ok"]
    run_dir.config.chmod(0o644)
    run_dir.path.chmod(0o755)
    told = [finding.advice for finding in servers_here.run_directories()]
    assert told == [f"chmod 700 {run_dir.path}", f"chmod 600 {run_dir.config}"]


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 112 1 0 100 0 0 10 0
   2: 0100007F:9C40 0100007F:1F40 01 00000000:00000000 00:00000000 00000000     0        0 113 1 0 100 0 0 10 0
"""
TCP6 = """\
  sl  local_address remote_address st tx rx tr tm retrnsmt uid timeout inode
   0: 00000000000000000000000001000000:1F40 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 114 1 0
   1: 0000000000000000FFFF00000100007F:1F41 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 115 1 0
"""


def test_the_kernel_s_table_of_sockets_is_read() -> None:
    assert listening.parse_table(TCP) == {111: ("127.0.0.1", 8000), 112: ("0.0.0.0", 22)}
    assert listening.parse_table(TCP6) == {114: ("::1", 8000), 115: ("127.0.0.1", 8001)}


def test_a_process_s_own_listening_socket_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mine:
        found = listening.listeners([os.getpid()])
        if found is None:
            pytest.skip("no /proc here")
        assert mine.getsockname()[1] in [each.port for each in found if each.is_loopback]


def test_what_listens_beyond_loopback_is_told_unless_it_was_asked_for() -> None:
    own, ray = Listener("0.0.0.0", 8000, 1, "gateway"), Listener("0.0.0.0", 10002, 2, "raylet")
    local = Listener("127.0.0.1", 6400, 3, "gcs_server")

    def judged(*found: Listener, is_loopback: bool) -> list[Finding]:
        return servers_here.judge_sockets("sockets", list(found), 8000, is_loopback)

    assert states(judged(local, is_loopback=True)) == ["ok"]
    (asked,) = judged(own, local, is_loopback=False)
    assert "as its host says" in asked.detail
    (unasked,) = judged(ray, local, is_loopback=True)
    assert "raylet" in unasked.detail
    assert unasked.advice


def test_a_server_that_holds_its_lock_but_does_not_answer_is_bad(quiet: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    server = FakeServer(number)
    try:
        found = list(report.findings(None))
    finally:
        server.close()
    assert [f.state for f in found if f.name == f"server on :{number}"] == ["bad"]


def run_client(name: str, answer: Any) -> Any:
    http = FakeHttp(answer, headers={"content-type": "text/event-stream", "x-request-id": "r"})
    try:
        return CliRunner().invoke(app, ["doctor", "--client", name, "--url", http.url, "--json"])
    finally:
        http.close()


def test_a_server_whose_replies_break_a_client_is_told_so() -> None:
    result = run_client("llm", lambda body: sse("hello", done=False))
    told = json.loads(result.stdout)
    assert (result.exit_code, told["works"]) == (1, False)
    assert "it does not end with data: [DONE]" in told["steps"][0]["problems"]


def test_an_unknown_client_is_a_mistake_of_the_command_line() -> None:
    result = CliRunner().invoke(app, ["doctor", "--client", "codexx"])
    assert result.exit_code == 2
    assert "did you mean 'codex'?" in result.stderr
