"""Every command against a fake server: what people and scripts read, and how failures end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hostler import errors
from hostler.config import HostlerConfig
from typer.testing import Result

from cli import servers, status, store

from .fakes import FakeServer
from .fakes import status as fake_status

Hostler = Callable[..., Result]
COMMANDS = ["serve", "chat", "ps", "models", "pull", "load", "unload", "plan", "pin", "unpin", "rm", "config"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_s_help_has_examples(command: str, hostler: Hostler) -> None:
    result = hostler(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert f"hostler {command}" in result.output


def test_help_loads_nothing_that_is_slow() -> None:
    code = (
        "import sys; from cli.main import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
        "bad = {'grpc','pydantic','httpx','yaml','torch','ray','asyncio','hostler.config'} & set(sys.modules)\n"
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "hostler serve" in done.stdout


@pytest.mark.parametrize("args", [["ps"], ["load", "x"], ["unload", "x"], ["plan", "x"], ["pin", "x"], ["chat"]])
def test_without_a_server_every_command_says_how_to_start_one(args: list[str], hostler: Hostler) -> None:
    result = hostler(*args)
    assert result.exit_code == 1
    assert result.stderr == "hostler: no hostler is running; start one with `hostler serve`\n"


def test_a_run_directory_without_a_held_lock_is_no_server(hostler: Hostler, server: FakeServer) -> None:
    server.close()
    assert "no hostler is running" in hostler("ps").stderr


def test_a_wrong_port_names_the_right_one(hostler: Hostler, server: FakeServer) -> None:
    assert "port 9 (but on 8123)" in hostler("ps", "--port", "9").stderr
    assert "port 9 (but on 8123)" in hostler("ps", env={"HOSTLER_PORT": "9"}).stderr


def test_two_servers_must_be_told_apart(hostler: Hostler, server: FakeServer) -> None:
    second = FakeServer(8124)
    try:
        assert "8123, 8124" in hostler("ps").stderr
        assert json.loads(hostler("ps", "--json", "--port", "8124").stdout)["port"] == 8124
    finally:
        second.close()


def test_ps_json_has_plain_numbers_and_words(hostler: Hostler, server: FakeServer) -> None:
    values = json.loads(hostler("ps", "--json").stdout)
    assert values["pid"] == os.getpid()
    assert values["devices"][0]["budget_bytes"] == 8 * 2**30
    (replica,) = values["replicas"]
    assert (replica["model"], replica["state"], replica["device"], replica["pid"]) == ("tiny", "ready", "cpu", 4242)
    assert (replica["num_running"], replica["num_queued"], replica["max_running"]) == (3, 1, 16)
    assert replica["idle_s"] == 0.0


def test_ps_shows_people_the_same(hostler: Hostler, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = hostler("ps").stdout
    for word in ("cpu", "8.0 GiB", "tiny", "ready", "3/16", "4242", "the only device"):
        assert word in text


def test_rates_come_from_two_samples_of_one_generation() -> None:
    before = status.status_json(fake_status(), 1, 1)
    after = status.status_json(fake_status(), 1, 1)
    after["replicas"][0]["num_completion_tokens_total"] += 50
    assert status.with_rates(after, before, 2.0)["replicas"][0]["completion_tokens_per_s"] == 25.0
    after["replicas"][0] |= {"generation": 8, "completion_tokens_per_s": None}
    assert status.with_rates(after, before, 2.0)["replicas"][0]["completion_tokens_per_s"] is None


def test_models_json_joins_the_server_s_and_the_disk_s(
    hostler: Hostler, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "listing", lambda models_dir: [{"name": "tiny", "bytes": 5}])
    values = json.loads(hostler("models", "--json").stdout)
    assert [(m["name"], m["state"], m["failure"]) for m in values["served"]] == [
        ("tiny", "ready", None),
        ("broken", "failed", "no space left on the disk"),
    ]
    assert [m["quantize"] for m in values["served"]] == ["int4", None]
    assert values["stored"][0]["name"] == "tiny"
    monkeypatch.setenv("COLUMNS", "160")
    text = hostler("models").stdout
    assert "ON DISK" in text
    assert "int4" in text


def test_load_follows_the_progress(hostler: Hostler, server: FakeServer) -> None:
    lines = [json.loads(line) for line in hostler("load", "tiny", "--json").stdout.splitlines()]
    assert [line["stage"] for line in lines] == ["spawn", "read", "ready"]
    assert lines[1]["total_bytes"] == 100
    assert server.placement.calls == [("EnsureModel", "tiny")]
    assert "tiny is ready" in hostler("load", "tiny").stdout


@pytest.mark.parametrize("command", ["load", "unload", "plan", "pin"])
def test_a_refusal_is_one_line_and_exit_code_1(command: str, hostler: Hostler, server: FakeServer) -> None:
    result = hostler(command, "nope")
    assert (result.exit_code, result.stderr) == (1, "hostler: No model is named 'nope'.\n")


def test_a_model_that_never_fits_says_so(hostler: Hostler, server: FakeServer) -> None:
    assert "900 GiB" in hostler("load", "huge").stderr


def test_debug_shows_the_traceback(hostler: Hostler, server: FakeServer) -> None:
    result = hostler("load", "nope", env={"HOSTLER_DEBUG": "1"})
    assert isinstance(result.exception, errors.ModelNotFound)


def test_unload_plan_and_pin_as_json(hostler: Hostler, server: FakeServer) -> None:
    assert json.loads(hostler("unload", "tiny", "--json").stdout) == {"model": "tiny", "num_unloaded": 1}
    plan = json.loads(hostler("plan", "tiny", "--json").stdout)
    assert (plan["feasible"], plan["device"], plan["evict_models"]) == (True, "cpu", ["other"])
    assert plan["quantize"] == "int4"
    assert "needs 3.0 GiB with int4 weights" in hostler("plan", "tiny").stdout
    assert json.loads(hostler("pin", "tiny", "--json").stdout) == {"model": "tiny", "pinned": True}
    assert server.placement.pinned == {"tiny": True}
    hostler("unpin", "tiny")
    assert server.placement.pinned == {"tiny": False}


def test_a_lock_without_an_orchestrator_is_explained(hostler: Hostler, server: FakeServer) -> None:
    server._server.stop(None).wait(5)
    result = hostler("ps")
    assert result.exit_code == 1
    assert "orchestrator does not answer" in result.stderr


def store_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    script = tmp_path / "store.py"
    script.write_text(code)
    monkeypatch.setattr(store, "_command", lambda *args, models_dir: [sys.executable, str(script), *args])


def test_pull_passes_json_through_and_draws_lines(
    hostler: Hostler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = """if 1:
    import json
    print(json.dumps({"stage": "download", "done_bytes": 1, "total_bytes": 2, "detail": ""}), flush=True)
    print("a library's chatter")
    print(json.dumps({"stage": "done", "path": "/models/tiny", "name": "tiny"}), flush=True)"""
    store_that(monkeypatch, tmp_path, code)
    lines = [json.loads(line) for line in hostler("pull", "tiny", "--json").stdout.splitlines()]
    assert [line["stage"] for line in lines] == ["download", "done"]
    text = hostler("pull", "tiny").stdout
    assert "tiny: downloading 50 %" in text
    assert "tiny is at /models/tiny" in text


def test_a_pull_that_fails_says_why(hostler: Hostler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        'print(\'{"stage": "error", "reason": "model_not_found", "message": "No such model."}\'); raise SystemExit(1)'
    )
    store_that(monkeypatch, tmp_path, code)
    result = hostler("pull", "nope")
    assert (result.exit_code, result.stderr) == (1, "hostler: No such model.\n")
    store_that(monkeypatch, tmp_path, "raise RuntimeError('the disk is gone')")
    assert "the disk is gone" in hostler("pull", "nope").stderr


def test_version_as_json(hostler: Hostler) -> None:
    values = json.loads(hostler("version", "--json").stdout)
    assert {"hostler", "python", "grpcio", "torch", "ray"} <= values.keys()


def test_the_schema_is_the_configuration_s(hostler: Hostler) -> None:
    assert json.loads(hostler("config", "--schema").stdout) == HostlerConfig.model_json_schema()


def test_config_hides_the_key(hostler: Hostler) -> None:
    result = hostler("config", env={"HOSTLER_API_KEY": "very-secret-key"})
    assert "api_key: (set)" in result.stdout
    assert "very-secret-key" not in result.stdout


def test_faults_of_the_file_are_one_line_each_and_exit_code_2(hostler: Hostler, place: Path) -> None:
    (place / "hostler.yaml").write_text("prot: 9000\nmodels: [{name: a, kv_cache: lots}]")
    result = hostler("serve")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert "hostler: prot: unknown key; did you mean 'port'?" in lines
    assert "hostler: models.0.kv_cache: 'lots' is not a size; write it like 2GiB or 500MB" in lines


def test_serve_refuses_an_open_door_before_it_starts_anything(hostler: Hostler) -> None:
    result = hostler("serve", "--host", "0.0.0.0", "--port", "8125")
    assert result.exit_code == 2
    assert "openssl rand -hex 32" in result.stderr
    assert servers.live() == []


def test_a_second_serve_names_the_first(hostler: Hostler, server: FakeServer) -> None:
    result = hostler("serve", "--port", "8123")
    assert result.exit_code == 1
    assert f"already serving on port 8123 (pid {os.getpid()})" in result.stderr


def test_completion_knows_the_models_of_live_servers() -> None:
    fake = FakeServer(8126, {"models": [{"name": "tiny"}, {"name": "other"}]})
    try:
        assert servers.complete_model("t") == ["tiny"]
    finally:
        fake.close()
    assert servers.complete_model("t") == []
