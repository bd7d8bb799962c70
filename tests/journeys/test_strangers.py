"""What a running server leaves open: to other users of the machine, to the network, to callers of Ray, in its logs.

The other user is `nobody`, whom a process of its own becomes; without root the modes of the doors are looked at.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cli.doctor.listening import listeners
from tests.journeys.server import SCRIPTED_CONFIG, Server, Servers, wait_until

pytestmark = [pytest.mark.journey, pytest.mark.timeout(200)]

KEY = "hk_planted0123456789planted0123456789"
SECRETS = {
    "key": KEY,
    "hub": "hf_plantedplantedplantedplantedplanted",
    "tunnel": "2plantedTunnelToken0123456789",
    "program": "sk-planted-program-0123456789abcdef",
    "header": "planted-header-0123456789abcdef",
}
CONFIG = f"""\
api_key: {KEY}
models:
  - {{name: scripted, engine: scripted, preload: true}}
mcp_servers:
  program: {{command: [/bin/false], env: {{TOKEN: {SECRETS["program"]}}}, chat: true}}
  far: {{url: "http://127.0.0.1:9/mcp", headers: {{Authorization: "Bearer {SECRETS["header"]}"}}}}
gateways: 1
"""
HEADERS = {"authorization": f"Bearer {KEY}"}
MAY_HOLD_SECRETS = {"config.json", "hostler.yaml"}

OTHER_USER = """
import json, os, socket, sys
task = json.load(sys.stdin)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
opened = []
for path in task["files"] + [task["control"]]:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
        opened.append(path)
    except OSError:
        pass
for path in task["sockets"]:
    with socket.socket(socket.AF_UNIX) as end:
        try:
            end.connect(path)
            opened.append(path)
        except OSError:
            pass
told = []
for pid in task["pids"]:
    for name in ("cmdline", "environ"):
        try:
            told.append(open(f"/proc/{pid}/{name}", "rb").read().decode("latin-1"))
        except OSError:
            pass
json.dump({"uid": os.getuid(), "opened": opened, "told": told}, sys.stdout)
"""


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    """One server with a key and planted secrets, which nobody harms."""
    servers = Servers()
    env = {"HF_TOKEN": SECRETS["hub"], "NGROK_AUTHTOKEN": SECRETS["tunnel"], "HOSTLER_LOG_LEVEL": "DEBUG"}
    try:
        server = servers(config=CONFIG, env=env, wait_ready=False)
        _wait(server)
        yield server
    finally:
        servers.stop_all()


def _wait(server: Server) -> None:
    def ready() -> bool:
        try:
            return httpx.get(f"{server.url}/ready", headers=HEADERS, timeout=5).is_success
        except httpx.HTTPError:
            return False

    wait_until(ready, 90, "ready")


def everything_of(server: Server) -> list[Path]:
    return [path for path in (server.base, *server.base.rglob("*")) if not path.is_symlink()]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_opens_no_file_socket_or_process_of_a_server(keyed: Server) -> None:
    # As if it lay in a directory that everybody may enter.
    keyed.base.chmod(0o755)
    paths = [keyed.run_dir, *(path for path in keyed.run_dir.rglob("*") if not path.is_symlink())]
    sockets = [str(path) for path in paths if stat.S_ISSOCK(path.stat().st_mode)]
    assert {"gateway.sock", "orchestrator.sock", "raylet", "plasma_store"} <= {Path(path).name for path in sockets}
    pids = [process.pid for process in keyed.processes()]
    task = {
        "files": [str(path) for path in paths if not stat.S_ISSOCK(path.stat().st_mode)],
        "sockets": sockets,
        "pids": pids,
        "control": "/etc/passwd",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", OTHER_USER],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    result = json.loads(done.stdout)
    keyed.base.chmod(0o700)
    assert result["uid"] == 65534
    assert result["opened"] == ["/etc/passwd"]
    told = "".join(result["told"])
    assert "serve" in told  # Command lines are everybody's to read; no secret may stand in one.
    run_token = (keyed.run_dir / "token").read_text(encoding="ascii")
    ray_token = json.loads((keyed.run_dir / "ray.json").read_text(encoding="utf-8"))["token"]
    assert [name for name, secret in SECRETS.items() if secret in told] == []
    assert ray_token
    assert run_token not in told
    assert ray_token not in told


def test_the_doors_of_the_run_directory_are_shut_by_their_modes(keyed: Server) -> None:
    for path in (keyed.base, keyed.run_dir, keyed.run_dir / "logs"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for name in ("config.json", "token", "ray.json", "orchestrator.sock", "gateway.sock"):
        path = keyed.run_dir / name
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_nothing_of_a_server_listens_beyond_loopback(keyed: Server) -> None:
    found = listeners({process.pid for process in keyed.processes()})
    assert found
    assert keyed.port in {listener.port for listener in found}
    assert [listener for listener in found if not listener.is_loopback] == []


# Of each service of Ray that listens, what reads, changes or runs something.
RAY_CALLS = """
    ray.rpc.NodeInfoGcsService/GetAllNodeInfo ray.rpc.NodeInfoGcsService/GetClusterId
    ray.rpc.InternalKVGcsService/InternalKVGet ray.rpc.InternalKVGcsService/InternalKVPut
    ray.rpc.InternalKVGcsService/InternalKVKeys ray.rpc.JobInfoGcsService/AddJob
    ray.rpc.ActorInfoGcsService/RegisterActor ray.rpc.ActorInfoGcsService/KillActorViaGcs
    ray.rpc.autoscaler.AutoscalerStateService/GetClusterStatus
    ray.rpc.NodeManagerService/GetNodeStats ray.rpc.NodeManagerService/RequestWorkerLease
    ray.rpc.NodeManagerService/ShutdownRaylet ray.rpc.ObjectManagerService/Push ray.rpc.ObjectManagerService/Pull
    ray.rpc.CoreWorkerService/PushTask ray.rpc.CoreWorkerService/KillActor ray.rpc.CoreWorkerService/Exit
""".split()  # noqa: SIM905
SERVICES = {"NodeInfoGcsService", "NodeManagerService", "ObjectManagerService", "CoreWorkerService"}


def _call(port: int, method: str, token: str | None) -> tuple[grpc.StatusCode, str]:
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary(f"/{method}", lambda data: data, lambda data: data)
        try:
            call(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_every_port_of_ray_refuses_calls_without_its_token(keyed: Server, token: str | None) -> None:
    found = listeners({process.pid for process in keyed.processes()}) or []
    ports = {listener.port for listener in found} - {keyed.port}
    refused, answered = set(), []
    for port in sorted(ports):
        for method in RAY_CALLS:
            code, _ = _call(port, method, token)
            if code is grpc.StatusCode.UNAUTHENTICATED:
                refused.add(method.split("/")[0].rpartition(".")[2])
            elif code is not grpc.StatusCode.UNIMPLEMENTED:
                answered.append((port, method, code))
    assert answered == []
    assert refused >= SERVICES
    assert httpx.get(f"{keyed.url}/ready", headers=HEADERS, timeout=10).is_success


JOIN = """
import sys, ray
try:
    ray.init(address=sys.argv[1], namespace="hostler", log_to_driver=False, logging_level="ERROR")
except BaseException as error:
    print("REFUSED", type(error).__name__)
else:
    print("JOINED", len(ray.util.list_named_actors(all_namespaces=True)))
"""


def _join(server: Server, **variables: str) -> str:
    session = json.loads((server.run_dir / "ray.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables = {name: session["token"] if value == "THE TOKEN" else value for name, value in variables.items()}
    environ = {**kept, "HOME": str(server.base), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **variables}
    command = [sys.executable, "-c", JOIN, session["address"]]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=40, check=False)
    except subprocess.TimeoutExpired:
        return "REFUSED by silence"
    return done.stdout.strip() or f"REFUSED with {done.returncode}"


@pytest.mark.parametrize(
    "variables",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["without a token", "with a wrong token"],
)
def test_a_ray_client_does_not_join_without_the_token(keyed: Server, variables: dict[str, str]) -> None:
    assert _join(keyed, **variables).startswith("REFUSED")


def test_a_ray_client_with_the_token_joins_so_the_refusals_are_the_token_s(keyed: Server) -> None:
    assert _join(keyed, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="THE TOKEN").startswith("JOINED")


def test_a_call_that_ends_rays_control_plane_without_a_token_costs_seconds(hostler_server: Servers) -> None:
    """Ray 2.60 reads a header of this call before it looks at the token, and aborts when it is missing."""
    server = hostler_server(config=SCRIPTED_CONFIG)
    body: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}]}
    session = json.loads((server.run_dir / "ray.json").read_text(encoding="utf-8"))
    code, _ = _call(int(session["address"].rpartition(":")[2]), "ray.rpc.syncer.RaySyncer/StartSync", None)
    assert code is not grpc.StatusCode.OK

    def is_served() -> bool:
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).is_success

    wait_until(is_served, 60, "served again")


def test_no_secret_is_written_or_answered_anywhere(keyed: Server) -> None:
    body: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}]}
    with httpx.Client(base_url=keyed.url, headers=HEADERS, timeout=30) as client:
        replies = [
            client.post("/v1/chat/completions", json=body),
            client.post("/v1/chat/completions", json=body | {"model": KEY + "x"}),
            client.post(
                "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}", "x-api-key": "w"}
            ),
            *(client.get(path) for path in ("/v1/models", "/admin/status", "/admin/events", "/admin/mcp", "/metrics")),
            client.get("/v1/models", headers={"authorization": "Bearer sk-wrong"}),
        ]
    shown = [reply.text.replace(KEY + "x", "") for reply in replies]
    file = str(keyed.base / "hostler.yaml")
    for command in (("config", "--config", file), ("ps",), ("events",), ("doctor", "--json", "--config", file)):
        done = keyed.hostler(*command)
        shown.append(done.stdout + done.stderr)
    assert any("scripted" in text for text in shown)
    files = [path for path in everything_of(keyed) if path.is_file() and path.name not in MAY_HOLD_SECRETS]
    assert {"gateway-0.log", "orchestrator.log", "serve.out"} <= {path.name for path in files}
    written = {path.name: path.read_bytes() for path in files}
    for name, secret in SECRETS.items():
        assert [text[:200] for text in shown if secret in text] == [], name
        assert [path for path, data in written.items() if secret.encode() in data] == [], name
