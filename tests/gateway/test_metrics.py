"""/metrics: what is counted of requests, what is told of devices and models, and several gateways' numbers in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from hostler.errors import ModelLoadFailed
from hostler.placement.v1 import placement_pb2 as pb
from prometheus_client.parser import text_string_to_metric_families

from gateway.shared_numbers import share_numbers
from tests.gateway.fakes import MODEL, World, fail_once

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scraped(here: World) -> Samples:
    reply = await here.client.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    return parsed(reply.text)


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


def of_chat(name: str, **more: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return key(name, gen_ai_operation_name="chat", gen_ai_request_model=MODEL, **more)


async def test_a_request_is_counted_with_its_tokens_its_time_and_its_first_token(called: World) -> None:
    for _ in range(3):
        assert (await called.chat("one two three")).status_code == 200
    seen = await scraped(called)
    assert seen[of_chat("gen_ai_server_request_duration_seconds_count", error_type="")] == 3
    assert seen[of_chat("gen_ai_server_time_to_first_token_seconds_count")] == 3
    assert seen[of_chat("gen_ai_server_time_per_output_token_seconds_count")] == 3
    assert seen[key("hostler_tokens_total", gen_ai_request_model=MODEL, type="completion")] == 9
    assert seen[key("hostler_tokens_total", gen_ai_request_model=MODEL, type="prompt")] == 15
    assert seen[key("hostler_requests_in_flight", gen_ai_request_model=MODEL)] == 0
    assert seen[key("hostler_http_replies_total", method="POST", status="200")] == 3


async def test_a_request_that_fails_is_counted_by_its_reason(called: World) -> None:
    called.worker.script = fail_once(ModelLoadFailed("no"))
    assert (await called.chat("hello")).status_code >= 500
    seen = await scraped(called)
    assert seen[of_chat("gen_ai_server_request_duration_seconds_count", error_type="model_load_failed")] == 1
    assert of_chat("gen_ai_server_time_to_first_token_seconds_count") not in seen


async def test_a_name_that_no_model_has_makes_no_series(called: World) -> None:
    await called.client.post("/v1/chat/completions", json={"model": "x" * 50, "messages": []})
    assert not any("x" * 50 in str(labels) for _, labels in await scraped(called))


async def test_devices_models_and_events_are_told_as_the_orchestrator_sees_them(called: World) -> None:
    called.placement.status = pb.GetStatusResponse(
        devices=[pb.Device(id="cuda:0", budget_bytes=100, reserved_bytes=60, foreign_bytes=5, total_bytes=120)],
        models=[pb.ModelRoute(name="m", state=pb.MODEL_STATE_READY)],
        replicas=[
            pb.ReplicaStatus(model="m", parts=[pb.DeviceBytes(device="cuda:0", num_bytes=30)]),
            pb.ReplicaStatus(model="m", parts=[pb.DeviceBytes(device="cuda:0", num_bytes=30)]),
        ],
        event_counts=[
            pb.EventCount(kind=pb.EVENT_KIND_READY, model="m", count=2, duration_ms=1500),
            pb.EventCount(kind=pb.EVENT_KIND_EVICTED, model="n", count=4),
        ],
    )
    seen = await scraped(called)
    assert seen[key("hostler_orchestrator_up")] == 1
    assert seen[key("hostler_device_reserved_bytes", device="cuda:0", node="")] == 60
    assert seen[key("hostler_model_state", model="m", state="ready")] == 1
    assert seen[key("hostler_model_device_bytes", model="m", device="cuda:0")] == 60
    assert seen[key("hostler_model_replicas", model="m")] == 2
    assert seen[key("hostler_events_total", kind="evicted", model="n")] == 4
    assert seen[key("hostler_load_seconds_total", model="m")] == 1.5


async def test_without_the_orchestrator_the_gateways_numbers_are_told_all_the_same(called: World) -> None:
    assert (await called.chat("hello")).status_code == 200
    await called.placement.stop()
    seen = await scraped(called)
    assert seen[key("hostler_orchestrator_up")] == 0
    assert seen[of_chat("gen_ai_server_request_duration_seconds_count", error_type="")] == 1


async def test_a_web_page_may_not_read_them_where_no_key_is_demanded(called: World) -> None:
    reply = await called.client.get("/metrics", headers={"origin": "http://evil.example"})
    assert reply.status_code == 403


_PROCESS = """
import sys
from pathlib import Path
from gateway.shared_numbers import share_numbers
share_numbers(Path(sys.argv[1]))
from gateway.metrics import Meter
meter = Meter()
meter.reply("GET", 200)
request = meter.request("chat", "m")
request.__enter__()
print(meter.text().decode())
sys.stdout.flush()
if sys.argv[2] == "stay":
    sys.stdin.read()
"""


def run(directory: Path, manner: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROCESS, str(directory), manner]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environment)


def test_numbers_of_several_gateways_are_added_up_and_the_dead_have_nothing_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "metrics"
    with run(directory, "end") as dead:
        dead.communicate()
    with run(directory, "stay") as living:
        assert living.stdout is not None
        assert living.stdout.readline()
        with run(directory, "end") as last:
            text, _ = last.communicate()
        living.communicate()
    seen = parsed(text)
    assert seen[key("hostler_http_replies_total", method="GET", status="200")] == 3
    assert seen[key("hostler_requests_in_flight", gen_ai_request_model="m")] == 2
    assert oct(directory.stat().st_mode & 0o777) == "0o700"
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    share_numbers(directory)
    assert not list(directory.glob("gauge_live*"))


async def test_httpx_sees_them_over_tcp_under_v1_as_well(served: World) -> None:
    async with httpx.AsyncClient(base_url=served.client.base_url) as client:
        assert (await client.get("/v1/metrics")).status_code == 200
