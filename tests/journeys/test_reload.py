"""The configuration changes under a running server: streams go on byte for byte, new requests see the new one.

Real processes with the scripted engine, whose replies are a function of the request.
"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.journeys.server import HOSTLER, ROOT, Server, Servers, free_port, wait_until
from workers.scripted import expected_reply

pytestmark = [pytest.mark.journey, pytest.mark.timeout(240)]

KEY, NEW_KEY = "first-key-of-two", "second-key-of-two"
BEFORE = f"""\
api_key: {KEY}
max_body: 20000
gateways: 1
models:
  - {{name: stays, engine: scripted, preload: true}}
  - {{name: goes, engine: scripted, preload: true, aliases: [went]}}
"""
AFTER = f"""\
api_key: {NEW_KEY}
max_body: 200000
gateways: 2
models:
  - {{name: stays, engine: scripted, preload: true, keep_alive: 1h}}
  - {{name: comes, engine: scripted}}
"""
SCRIPTED = "gateways: 1\nmodels:\n  - {name: one, engine: scripted, preload: true}\n"


def write(server: Server, text: str) -> None:
    (server.base / "hostler.yaml").write_text(text, encoding="utf-8")


def ask(server: Server, model: str, key: str, prompt: str = "hello", **fields: int) -> httpx.Response:
    body = {"model": model, "seed": 1, "messages": [{"role": "user", "content": prompt}], **fields}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=100)


def served(server: Server, key: str) -> list[str]:
    headers = {"authorization": f"Bearer {key}"}
    return [m["id"] for m in httpx.get(f"{server.url}/v1/models", headers=headers, timeout=10).json()["data"]]


async def stream(server: Server, model: str, prompt: str, key: str, on_first: Callable[[], None]) -> str:
    """Return a reply whose stream ended as it should; the name of the error otherwise."""
    body = {"model": model, "stream": True, "seed": 1, "messages": [{"role": "user", "content": prompt}]}
    headers = {"authorization": f"Bearer {key}", "x-request-id": "same-for-everybody"}
    text, done = "", False
    async with (
        httpx.AsyncClient(timeout=90) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        on_first()
                        text += piece
    assert done
    return text


def said(server: Server, words: str) -> int:
    return server.output.read_text(encoding="utf-8").count(words)


async def test_streams_run_through_a_reload_and_new_requests_see_the_new_configuration(
    hostler_server: Servers,
) -> None:
    server = hostler_server(config=BEFORE, wait_ready=False)
    wait_until(lambda: said(server, "Serving on") == 1, 60, "it serves")
    prompts = [f"[[tokens=80]] [[delay_ms=100]] number {number}" for number in range(8)]
    begun: set[int] = set()
    streams = [
        asyncio.create_task(
            stream(server, "goes" if n == 0 else "stays", prompt, KEY, lambda n=n: begun.add(n))  # type: ignore[misc]
        )
        for n, prompt in enumerate(prompts)
    ]
    async with asyncio.timeout(30):
        while len(begun) < len(prompts):
            await asyncio.sleep(0.02)
    old_gateways = server.pids("-m gateway")
    write(server, AFTER)
    server.process.send_signal(signal.SIGHUP)
    async with asyncio.timeout(20):
        while not said(server, "reloaded the configuration"):
            await asyncio.sleep(0.05)
    assert not any(task.done() for task in streams), "the streams must outlast the reload"
    for model in ("stays", "comes"):
        assert await asyncio.to_thread(lambda model=model: ask(server, model, NEW_KEY).status_code) == 200  # type: ignore[misc]
    wide = await asyncio.to_thread(ask, server, "stays", NEW_KEY, "x" * 50_000)
    assert wide.status_code == 200
    assert (await asyncio.to_thread(ask, server, "stays", KEY)).status_code == 401
    for gone in ("goes", "went"):
        assert (await asyncio.to_thread(ask, server, gone, NEW_KEY)).status_code == 404
    for task, prompt in zip(streams, prompts, strict=True):
        assert await task == expected_reply(prompt, 1, "same-for-everybody", 80)
    # The old gateway has nothing left to do; the new ones are two.
    wait_until(lambda: not set(old_gateways) & set(server.pids("-m gateway")), 20, "the old gateway ends")
    assert len(server.pids("-m gateway")) == 2
    # Behind them only what is in the store.
    assert served(server, NEW_KEY)[:2] == ["stays", "comes"]
    assert server.stop() == 0
    assert not server.leftovers


async def test_a_load_that_is_under_way_goes_on_through_a_reload(hostler_server: Servers) -> None:
    config = SCRIPTED + "  - {name: SmolLM2-135M-Instruct}\n"
    server = hostler_server(config=config)
    asking = asyncio.create_task(asyncio.to_thread(ask, server, "SmolLM2-135M-Instruct", "any", max_tokens=4))
    log = server.run_dir / "logs" / "orchestrator.log"
    await asyncio.sleep(0.1)
    write(server, config + "  - {name: comes, engine: scripted}\n")
    outcome = await asyncio.to_thread(server.hostler, "reload", "--port", str(server.port))
    assert outcome.returncode == 0, outcome.stderr
    assert not asking.done(), "the load must outlast the reload"
    assert (await asyncio.to_thread(ask, server, "comes", "any")).status_code == 200
    reply = await asking
    assert reply.status_code == 200, reply.text
    assert "its load was given up" not in log.read_text(encoding="utf-8")


def test_a_background_response_is_finished_by_the_gateway_that_has_begun_it(hostler_server: Servers) -> None:
    server = hostler_server(config=SCRIPTED + "drain_s: 0.5\n")
    body = {"model": "one", "background": True, "input": "[[tokens=60]] [[delay_ms=100]] go on"}
    begun = httpx.post(f"{server.url}/v1/responses", json=body, timeout=30).json()
    write(server, SCRIPTED + "drain_s: 0.5\nmax_body: 1MB\n")
    assert server.hostler("reload", "--port", str(server.port)).returncode == 0

    def look() -> str:
        return str(httpx.get(f"{server.url}/v1/responses/{begun['id']}", timeout=10).json()["status"])

    assert look() in ("queued", "in_progress")
    wait_until(lambda: look() not in ("queued", "in_progress"), 30, "the response ends")
    assert look() == "completed"


async def test_clients_do_not_notice_twenty_reloads_in_a_row(hostler_server: Servers) -> None:
    server = hostler_server(config=SCRIPTED)
    failures: list[str] = []
    num_answers = 0
    stop = asyncio.Event()

    async def one_after_the_other() -> None:
        nonlocal num_answers
        body = {"model": "one", "seed": 1, "messages": [{"role": "user", "content": "hello"}]}
        async with httpx.AsyncClient(timeout=30) as client:
            while not stop.is_set():
                try:
                    reply = await client.post(f"{server.url}/v1/chat/completions", json=body)
                    if reply.status_code != 200:
                        failures.append(reply.text)
                    num_answers += 1
                except httpx.HTTPError as error:
                    failures.append(repr(error))
                await asyncio.sleep(0.02)

    clients = [asyncio.create_task(one_after_the_other()) for _ in range(2)]
    for number in range(20):
        write(server, f"{SCRIPTED}max_body: {10**6 + number}\n")
        server.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.1)
    last = str(10**6 + 19)
    async with asyncio.timeout(60):
        while last not in (server.run_dir / "config.json").read_text():
            await asyncio.sleep(0.05)
    await asyncio.sleep(1.5)
    stop.set()
    await asyncio.gather(*clients)
    assert failures == []
    assert num_answers > 20
    assert server.process.poll() is None
    wait_until(lambda: len(server.pids("-m gateway")) == 1, 20, "one gateway is left")


def test_what_is_wrong_or_needs_a_restart_changes_nothing_and_is_told(hostler_server: Servers) -> None:
    server = hostler_server(config=SCRIPTED)
    port, gateways = str(server.port), server.pids("-m gateway")
    before = (server.run_dir / "config.json").read_text()
    write(server, SCRIPTED + "max_bodi: 3\n")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: said(server, "did you mean 'max_body'?") == 1, 10, "the fault is shown")
    broken = server.hostler("reload", "--port", port)
    assert (broken.returncode, "did you mean 'max_body'?" in broken.stderr) == (2, True)
    write(server, SCRIPTED + "max_body: 1MB\ndevices: [{id: cpu, budget: 1GB}]\n")
    restart = server.hostler("reload", "--port", port)
    assert restart.returncode == 2
    assert "devices:" in restart.stderr
    assert "needs a restart" in restart.stderr
    (server.base / "hostler.yaml").unlink()
    assert server.hostler("reload", "--port", port).returncode == 2
    write(server, SCRIPTED + "max_body: 1MB\n")
    dry = server.hostler("reload", "--dry-run", "--json", "--port", port)
    assert json.loads(dry.stdout) == {
        "ok": True,
        "faults": [],
        "changes": ["max_body: 8000000 → 1000000"],
        "warnings": [],
        "applied": False,
    }
    assert (server.run_dir / "config.json").read_text() == before
    assert server.pids("-m gateway") == gateways
    assert ask(server, "one", "any").status_code == 200
    done = server.hostler("reload", "--port", port)
    assert done.stdout.splitlines()[-1] == "reloaded"
    assert server.hostler("reload", "--port", port).stdout.strip() == "nothing has changed"
    assert not list(server.run_dir.glob("*reload-*"))


def test_where_a_terminal_controls_the_server_a_hang_up_still_stops_it(tmp_path: Path) -> None:
    base = Path(tempfile.mkdtemp(prefix="hs-", dir="/tmp"))
    port = free_port()
    (base / "hostler.yaml").write_text(SCRIPTED, encoding="utf-8")
    environment = {**os.environ, "HOSTLER_RUN_DIR": str(base)}
    command = [str(HOSTLER), "serve", "--port", str(port), "--config", str(base / "hostler.yaml")]
    master, slave = pty.openpty()
    takes_terminal = (
        "import fcntl,os,sys,termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", takes_terminal, *command],
        cwd=ROOT,
        env=environment,
        stdin=slave,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    server = Server(port, base, process)
    os.close(slave)
    try:
        wait_until(lambda: server.is_ready("one"), 90, "ready")
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 0
    finally:
        server.stop()
        os.close(master)
    assert not server.leftovers


def test_a_stop_while_gateways_are_being_replaced_is_clean(hostler_server: Servers) -> None:
    server = hostler_server(config=SCRIPTED)
    write(server, SCRIPTED + "max_body: 1MB\n")
    server.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert server.stop() == 0
    assert not server.leftovers


def test_a_stop_during_start_up_is_clean(hostler_server: Servers) -> None:
    for after_s in (0.6, 1.5):
        server = hostler_server(config=SCRIPTED, wait_ready=False)
        time.sleep(after_s)
        assert server.stop() in (0, -signal.SIGTERM)
        assert not server.leftovers
