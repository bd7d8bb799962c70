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

from cli import hints, servers, store

from .fakes import FakeServer

Hostler = Callable[..., Result]
COMMANDS = ["serve", "chat", "ps", "models", "pull", "load", "unload", "sleep", "plan", "pin", "unpin", "events"]
COMMANDS += ["rm", "config"]


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


@pytest.mark.parametrize(
    "args", [["ps"], ["load", "x"], ["unload", "x"], ["sleep", "x"], ["plan", "x"], ["pin", "x"], ["events"], ["chat"]]
)
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


def test_models_json_joins_the_server_s_and_the_disk_s(
    hostler: Hostler, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "listing", lambda models_dir: [{"name": "tiny", "bytes": 5}])
    values = json.loads(hostler("models", "--json").stdout)
    assert [(m["name"], m["state"], m["failure"]) for m in values["served"]] == [
        ("tiny", "ready", None),
        ("broken", "failed", "no space left on the disk"),
        ("napper", "asleep", None),
        ("later", "unloaded", None),
    ]
    assert [m["quantize"] for m in values["served"]] == ["int4", None, None, None]
    assert values["stored"][0]["name"] == "tiny"
    monkeypatch.setenv("COLUMNS", "160")
    text = hostler("models").stdout
    assert "ON DISK" in text
    assert "int4" in text


def test_load_follows_the_progress(hostler: Hostler, server: FakeServer) -> None:
    lines = [json.loads(line) for line in hostler("load", "tiny", "--json").stdout.splitlines()]
    assert [line["stage"] for line in lines] == ["spawn", "read", "ready"]
    assert (lines[1]["total_bytes"], lines[1]["eta_ms"], lines[1]["num_ahead"]) == (100, 3000, 0)
    assert server.placement.calls == [("EnsureModel", "tiny")]
    assert "tiny is ready" in hostler("load", "tiny").stdout


@pytest.mark.parametrize("command", ["load", "unload", "sleep", "plan", "pin"])
def test_a_refusal_is_one_line_and_exit_code_1(command: str, hostler: Hostler, server: FakeServer) -> None:
    result = hostler(command, "nope")
    assert (result.exit_code, result.stderr) == (
        1,
        "hostler: No model is named 'nope'. `hostler models` lists those that there are.\n",
    )


def test_a_model_that_never_fits_says_so(hostler: Hostler, server: FakeServer) -> None:
    result = hostler("load", "huge")
    assert "900 GiB" in result.stderr
    assert "`hostler plan huge` says what would help." in result.stderr


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (errors.ModelNotFound(""), "Did you mean 'Qwen3-Coder'? `hostler models` lists those that there are."),
        (errors.ModelNeverFits(""), "`hostler plan qwen-coder` says what would help."),
        (errors.ModelLoadFailed(""), "`hostler events` shows what went before."),
        (errors.OrchestratorAway(""), ""),
    ],
)
def test_a_refusal_says_what_to_do_next(error: errors.HostlerError, step: str) -> None:
    assert hints.next_step(error, "qwen-coder", ["SmolLM2", "Qwen3-Coder"]) == step


def test_a_refusal_keeps_its_kind_when_a_hint_is_added(hostler: Hostler, server: FakeServer) -> None:
    found = servers.find(None)
    with pytest.raises(errors.ModelLoadFailed, match="hostler events") as caught, hints.hinted(found, "tiny"):
        raise errors.ModelLoadFailed("broken", param="model", retry_after_s=7)
    assert (caught.value.param, caught.value.retry_after_s) == ("model", 7)


def test_debug_shows_the_traceback(hostler: Hostler, server: FakeServer) -> None:
    result = hostler("load", "nope", env={"HOSTLER_DEBUG": "1"})
    assert isinstance(result.exception, errors.ModelNotFound)


def test_unload_sleep_and_pin_as_json(hostler: Hostler, server: FakeServer) -> None:
    assert json.loads(hostler("unload", "tiny", "--json").stdout) == {"model": "tiny", "num_unloaded": 1}
    assert json.loads(hostler("sleep", "tiny", "--json").stdout) == {"model": "tiny", "num_asleep": 1}
    assert hostler("sleep", "tiny").stdout == "tiny goes to sleep; a request wakes it\n"
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
