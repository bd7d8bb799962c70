"""Public mode before the gateway: flags, the tunnel's process, and the self-test's words when the way is broken."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hostler.config import HostlerConfig, PublicConfig, write_resolved
from hostler.rundir import RunDir

from cli import serve, settings, tunnel
from cli.exits import UsageError
from cli.self_test import run
from cli.settings import Flags
from tests.journeys.server import free_port
from tests.tunnel.stand_in import stand_in

KEY = "sesame-open-up"
TOKEN = "2token_of_nobody"
URL = "https://roundhouse.ngrok-free.app"
# What the tunnel's process needs of the SDK: `forward` hands out something with a `url` and a `close`.
SDK = f'''
import os

class Listener:
    def url(self): return "{URL}"
    async def close(self): pass

async def forward(addr, authtoken, **options):
    if os.environ.get("REFUSE"):
        raise ValueError(f"no: {{authtoken}} is not\\nknown")
    print(addr, options, flush=True)
    return Listener()
'''


def resolve(**flags: Any) -> HostlerConfig:
    return settings.resolve(Flags(**flags), environ={"XDG_CONFIG_HOME": "/nowhere"})[0]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdk").mkdir()
    (tmp_path / "sdk" / "ngrok.py").write_text(SDK)
    public = PublicConfig(enabled=True, ngrok=True, port=8001, domain="roundhouse.ngrok-free.app")
    write_resolved(HostlerConfig(api_key=KEY, public=public), RunDir(tmp_path).config)
    return RunDir(tmp_path)


def start(place: RunDir, **env: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(place.path / "sdk"), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, tunnel.TOKEN: TOKEN, **env}
    command = [sys.executable, "-P", "-m", "cli.tunnel", "--run-dir", str(place.path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"public": True, "public_url": "https://a.example"}, "needs an API key"),
        ({"ngrok": True}, "needs an API key"),
        ({"public": True, "api_key": KEY}, "--public-url"),
        ({"domain": "a.example", "api_key": KEY}, "add --ngrok"),
        ({"public_port": 9000, "api_key": KEY}, "want --public"),
    ],
)
def test_flags_that_would_be_open_or_of_no_effect_are_refused(place: RunDir, flags: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve(**flags)


def test_the_public_port_is_the_next_one_and_gateways_inherit_it(place: RunDir) -> None:
    config = resolve(public=True, public_url="https://a.example", api_key=KEY, port=9000)
    assert (config.public.enabled, config.public.port, config.public.ngrok) == (True, 9001, False)
    gateway = next(child for child in serve.children(config, place, 5, {}, 6) if child.name == "gateway-0")
    assert gateway.pass_fds == (5, 6)
    assert gateway.command[-2:] == ("--public-fd", "6")
    assert "tunnel" not in [child.name for child in serve.children(config, place, 5, {}, 6)]
    with_tunnel = resolve(ngrok=True, api_key=KEY)
    held = next(child for child in serve.children(with_tunnel, place, 5, {}, 6) if child.name == "tunnel")
    assert place.tunnel in held.removes


def test_a_missing_sdk_or_token_stops_the_start_and_says_what_to_do(
    place: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = HostlerConfig(api_key=KEY, public=PublicConfig(enabled=True, ngrok=True))
    monkeypatch.setenv("HOME", str(place.path))
    monkeypatch.setattr(tunnel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'hostler\[ngrok\]'"):
        tunnel.refuse_without_ngrok(config, {})
    monkeypatch.setattr(tunnel.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="NGROK_AUTHTOKEN"):
        tunnel.refuse_without_ngrok(config, {})
    tunnel.refuse_without_ngrok(config, {tunnel.TOKEN: TOKEN})


@pytest.mark.parametrize("text", [f"authtoken: {TOKEN}", f"version: 3\nagent:\n  authtoken: {TOKEN}"])
def test_the_token_is_found_where_ngrok_puts_it(tmp_path: Path, text: str) -> None:
    assert tunnel.find_token({}, tmp_path) is None
    file = tmp_path / ".config" / "ngrok" / "ngrok.yml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert tunnel.find_token({}, tmp_path) == TOKEN
    assert tunnel.find_token({tunnel.TOKEN: "another"}, tmp_path) == "another"


def test_the_tunnel_tells_its_address_and_takes_it_back(place: RunDir) -> None:
    process = start(place)
    try:
        deadline = time.monotonic() + 30
        while not tunnel.read_url(place.tunnel) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        assert tunnel.read_url(place.tunnel) == URL
        assert stat.S_IMODE(place.tunnel.stat().st_mode) == 0o600
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert not place.tunnel.exists()
    assert "127.0.0.1:8001 {'domain': 'roundhouse.ngrok-free.app'}" in output
    assert TOKEN not in output


def test_a_refusal_is_one_line_without_the_token(place: RunDir) -> None:
    process = start(place, REFUSE="1")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert output == "no tunnel: no: (token) is not known\n"
    assert not place.tunnel.exists()


async def test_a_tunnel_with_nobody_behind_it_is_told_from_this_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(free_port(), tmp_path) as edge:
        monkeypatch.setenv("SSL_CERT_FILE", str(edge.authority))
        checks = [check async for check in run(f"https://localhost:{edge.port}", "any", KEY)]
    assert [check.name for check in checks] == ["preflight", "verify", "stream", "tool call"]
    assert all("ERR_NGROK_8012" in check.problem for check in checks), json.dumps([c.problem for c in checks])
