"""The image and its compose files: judged by hadolint and by compose itself, and kept to what set-up and serve say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hostler.config import HostlerConfig

from tests.checks.tree import ROOT

from . import tools

FOLDER = ROOT / "deploy" / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
STOPPING_BEYOND_DRAIN_S = 45
"""What the supervisor may take after running requests had their time: as in the units of systemd."""


def compose(*files: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `docker compose config` over these files, with this environment and no other."""
    command = [tools.find("docker-compose"), *(word for file in files for word in ("--file", file))]
    return subprocess.run(
        [*command, "config", "--format", "json"],
        cwd=FOLDER,
        env={"PATH": "/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def services(*files: str, **environ: str) -> dict[str, Any]:
    done = compose(*files, HOSTLER_API_KEY="k" * 64, **environ)
    assert done.returncode == 0, done.stderr
    assert "level=warning" not in done.stderr
    return json.loads(done.stdout)["services"]


def judge(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tools.find("hadolint"), "-"], input=text, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.timeout(300)
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = judge(DOCKERFILE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_hadolint_would_find_something() -> None:
    assert "DL3020" in judge(DOCKERFILE.replace("COPY . .", "ADD . .")).stdout


@pytest.mark.timeout(300)
def test_without_a_key_compose_says_how_to_make_one() -> None:
    done = compose("compose.yaml")
    assert done.returncode != 0
    assert "openssl rand -hex 32" in done.stderr


@pytest.mark.timeout(300)
def test_the_server_is_reached_from_this_machine_alone_and_can_do_little() -> None:
    server = services("compose.yaml")["hostler"]
    assert [port["host_ip"] for port in server["ports"]] == ["127.0.0.1"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    assert "deploy" not in server


@pytest.mark.timeout(300)
def test_the_server_has_the_time_to_let_running_requests_finish() -> None:
    server = services("compose.yaml")["hostler"]
    minutes, seconds = re.fullmatch(r"(?:(\d+)m)?(\d+)s", server["stop_grace_period"]).groups()  # type: ignore[union-attr]
    assert int(minutes or 0) * 60 + int(seconds) >= HostlerConfig().drain_s + STOPPING_BEYOND_DRAIN_S


@pytest.mark.timeout(300)
def test_with_the_cuda_file_the_other_build_gets_the_gpus() -> None:
    server = services("compose.yaml", "compose.cuda.yaml")["hostler"]
    assert server["build"]["args"] == {"DEVICE": "cuda"}
    (reserved,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert reserved["driver"] == "nvidia"
    assert reserved["capabilities"] == ["gpu"]


@pytest.mark.timeout(300)
def test_with_caddy_the_world_reaches_the_public_port_and_no_other() -> None:
    both = services("compose.yaml", "compose.caddy.yaml", HOSTLER_DOMAIN="llm.example.org")
    server, caddy = both["hostler"], both["caddy"]
    for_all = {port["published"] for port in server["ports"] if "host_ip" not in port}
    assert for_all == {"80", "443"}
    assert server["command"][-3:] == ["--public", "--public-url", "https://llm.example.org"]
    assert caddy["network_mode"] == "service:hostler"
    assert caddy["cap_drop"] == ["ALL"]
    (mounted,) = [volume["source"] for volume in caddy["volumes"] if volume["type"] == "bind"]
    assert Path(mounted) == ROOT / "deploy" / "caddy" / "Caddyfile"


def test_the_image_takes_the_torch_that_setup_takes() -> None:
    pinned = re.findall(r'TORCH_CPU="torch==([\d.]+)\+cpu"', (ROOT / "deploy" / "setup.sh").read_text(encoding="utf-8"))
    assert set(re.findall(r"^ARG TORCH=(.+)$", DOCKERFILE, re.MULTILINE)) == set(pinned)


def test_every_folder_of_the_wheel_gets_into_the_image_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    rest = {"pyproject.toml", "README.md", "LICENSE", "deploy/ray-cluster/start.sh"}
    assert let_in == {Path(package).parts[0] for package in packages} | rest
    assert all((ROOT / name).exists() for name in let_in)


class _Health(BaseHTTPRequestHandler):
    """Answers the first request well, every other with a 503."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200 if len(self.asked) == 1 else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_the_image_looks_after_its_own_health() -> None:
    (text,) = re.findall(
        r"^HEALTHCHECK .*\n  CMD (\[.*?\])$", DOCKERFILE.replace("\\\n", "\n"), re.MULTILINE | re.DOTALL
    )
    program, *arguments = json.loads(text)
    assert program == "python"
    with HTTPServer(("127.0.0.1", 0), _Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"HOSTLER_PORT": str(server.server_port)}
        codes = [
            subprocess.run([sys.executable, *arguments], env=environ, stderr=subprocess.DEVNULL, timeout=30).returncode
            for _ in range(2)
        ]
        server.shutdown()
    assert _Health.asked == ["/health", "/health"]
    assert codes[0] == 0
    assert codes[1] != 0


def test_the_image_runs_as_a_user_without_rights() -> None:
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    (user,) = re.findall(r"^USER (\d+):\d+$", last_stage, re.MULTILINE)
    assert int(user) > 0
    assert last_stage.index("\nUSER ") < last_stage.index("\nENTRYPOINT ")
