"""Keys of the key file at the gateway's door: who may come in, to which models, and what ends with a key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hostler.config import ConfigError, HostlerConfig
from hostler.inference.v1 import inference_pb2 as pb
from hostler.keys import KeyFile

from gateway import server
from gateway.app import create_app
from gateway.server import Connection
from tests.gateway.fakes import MODEL, counting, route, text, world

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def config(file: KeyFile, **more: Any) -> dict[str, Any]:
    return {"keys_file": file.path, "require_key": True, **more}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def endless(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    while True:
        yield text("on ")
        await asyncio.sleep(0.01)


async def test_a_key_of_the_file_opens_and_no_other_does(file: KeyFile) -> None:
    _, key = file.add("laptop")
    async with world(over_tcp=False, config=config(file)) as here:
        ask = here.client.post
        assert (await ask("/v1/chat/completions", json=BODY, headers=bearer(key))).status_code == 200
        assert (
            await ask("/v1/messages", json={**BODY, "max_tokens": 5}, headers={"x-api-key": key})
        ).status_code == 200
        for wrong in (None, "", "hk_", key[:-1], key + "x", "' OR 1=1 --", file.read()[0].digest):
            reply = await ask("/v1/chat/completions", json=BODY, headers={} if wrong is None else {"x-api-key": wrong})
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), wrong


async def test_where_no_key_is_demanded_an_unknown_one_is_none_and_a_known_one_still_counts(file: KeyFile) -> None:
    _, key = file.add("ci", models=["other"])
    async with world(over_tcp=False, config={"keys_file": file.path}) as here:
        ask = here.client.post
        assert (await ask("/v1/chat/completions", json=BODY, headers=bearer("unused"))).status_code == 200
        assert (await ask("/v1/chat/completions", json=BODY, headers=bearer(key))).status_code == 404


async def test_a_server_that_demands_a_key_does_not_start_without_one(file: KeyFile) -> None:
    for values in (config(file), {"keys_file": file.path, "host": "0.0.0.0"}):
        with pytest.raises(ConfigError, match="hostler key create"):
            create_app(HostlerConfig(**values), placement_target="unix:/nowhere")


async def test_what_a_key_may_not_do_is_a_403(file: KeyFile) -> None:
    _, user = file.add("user")
    _, ops = file.add("ops", scopes=["admin"])
    async with world(over_tcp=False, config=config(file)) as here:
        for path in ("/admin/status", "/v1/admin/status", "/metrics"):
            assert (await here.client.get(path, headers=bearer(user))).status_code == 403, path
            assert (await here.client.get(path, headers=bearer(ops))).status_code == 200, path
        refused = await here.client.post("/v1/chat/completions", json=BODY, headers=bearer(ops))
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")


@pytest.mark.parametrize("allowed", ["tiny", "org/*", MODEL])
async def test_a_key_finds_and_lists_its_own_models_alone(file: KeyFile, allowed: str) -> None:
    _, key = file.add("ci", models=[allowed])
    async with world(over_tcp=False, config=config(file)) as here:
        await here.publish(route(here.worker, adapters=["helper"]), route(here.worker, name="secret", aliases=()))
        listed = (await here.client.get("/v1/models", headers=bearer(key))).json()["data"]
        assert [model["id"] for model in listed] == [MODEL]
        for path, body in (
            ("/v1/chat/completions", BODY),
            ("/v1/completions", {"prompt": "hello"}),
            ("/v1/responses", {"input": "hello"}),
            ("/v1/messages", {**BODY, "max_tokens": 5}),
            ("/v1/tokenize", {"prompt": "hello"}),
            ("/load_model", {}),
        ):
            for model in ("secret", "helper"):
                reply = await here.client.post(path, json={**body, "model": model}, headers=bearer(key))
                assert reply.status_code == 404, path
        assert (await here.client.get("/v1/models/secret", headers=bearer(key))).status_code == 404
        reply = await here.client.post("/v1/chat/completions", json={**BODY, "model": "tiny"}, headers=bearer(key))
        assert reply.status_code == 200


async def test_keys_are_taken_and_revoked_while_the_server_runs(file: KeyFile) -> None:
    file.add("first")
    async with world(over_tcp=False, config=config(file)) as here:

        async def status(key: str) -> int:
            return (await here.client.get("/v1/models", headers=bearer(key))).status_code

        _, key = file.add("second")
        async with asyncio.timeout(3):
            while await status(key) != 200:
                await asyncio.sleep(0.02)
        file.path.write_text("{")
        await asyncio.sleep(0.4)
        assert await status(key) == 200, "a broken file keeps the keys that were good"
        file.path.unlink()
        async with asyncio.timeout(3):
            while await status(key) != 401:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_revoked_keys_stream_ends_with_an_error_and_anothers_goes_on(file: KeyFile, path: str) -> None:
    _, key = file.add("gone")
    _, other = file.add("stays")
    async with world(config=config(file)) as here:
        here.worker.script, here.worker.answer = endless, counting()
        body = {**BODY, "stream": True, "max_tokens": 1000}
        stays = asyncio.create_task(here.client.post(path, json={**body, "stream": False}, headers=bearer(other)))
        whole = asyncio.create_task(here.client.post(path, json={**body, "stream": False}, headers=bearer(key)))
        async with here.client.stream("POST", path, json=body, headers=bearer(key)) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            await here.worker.until_running(3)
            file.revoke("gone")
            began_s = time.monotonic()
            rest = [line async for line in lines]
        took_s = time.monotonic() - began_s
        assert took_s < 3, took_s
        assert any("revoked" in line for line in rest[-5:]), rest[-5:]
        assert (await whole).status_code == 401
        await here.worker.until_running(1)
        assert not stays.done()
        stays.cancel()
        await asyncio.gather(stays, return_exceptions=True)


async def test_a_key_that_expires_ends_as_a_revoked_one_does(file: KeyFile) -> None:
    _, key = file.add("short", lifetime_s=1.0)
    file.add("long")
    async with world(config=config(file)) as here:
        here.worker.script = endless
        reply = await here.client.post("/v1/chat/completions", json=BODY, headers=bearer(key))
        assert reply.status_code == 401
        assert "expired" in reply.json()["error"]["message"]
        assert (await here.client.get("/v1/models", headers=bearer(key))).status_code == 401


async def test_a_revoked_keys_background_response_ends(file: KeyFile) -> None:
    _, key = file.add("gone")
    file.add("stays")
    async with world(config=config(file)) as here:
        here.worker.script = endless
        body = {"model": MODEL, "input": "hello", "background": True}
        assert (await here.client.post("/v1/responses", json=body, headers=bearer(key))).status_code == 200
        await here.worker.until_running(1)
        file.revoke("gone")
        await here.worker.until_running(0)


@pytest.mark.parametrize("header", ["Authorization: Bearer ", "x-api-key: "])
async def test_a_key_of_a_megabyte_nul_or_foreign_letters_is_a_401(file: KeyFile, header: str) -> None:
    file.add("laptop")
    async with world(config=config(file)) as here:
        host, port = here.url.removeprefix("http://").split(":")
        for key in (b"k" * 10**6, b"k" * 15_000, b"a\0b", "schlüssel".encode(), b"\xff\xfe", b"x' OR '1'='1"):
            reader, writer = await asyncio.open_connection(host, int(port))
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n"
            writer.write(head + header.encode() + key + b"\r\n\r\n")
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
            assert b" 401 " in answer, (key[:10], answer)
            writer.close()


@pytest.mark.parametrize(
    ("header", "status"), [("Authorization: Bearer ", 401), ("x-api-key: ", 401), ("x-else: ", 400)]
)
async def test_nobody_waits_for_the_end_of_a_long_key(file: KeyFile, header: str, status: int) -> None:
    file.add("laptop")
    async with world(config=config(file)) as here:
        host, port = here.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nx-note: a\r\n" + header.encode())
        await asyncio.sleep(0.05)
        writer.write(b"k" * 20_000)  # of a million
        answer = await asyncio.wait_for(reader.read(), 1)  # its end comes with it, though we may still send
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        for _ in range(20):
            writer.write(b"k" * 50_000)
            await writer.drain()
        writer.close()


async def test_an_upload_without_a_key_is_refused_before_its_body_is_read(file: KeyFile) -> None:
    file.add("laptop")
    async with world(over_tcp=False, config=config(file)) as here:
        num_read, statuses = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal num_read
            num_read += 65536
            return {"type": "http.request", "body": bytes(65536), "more_body": num_read < 100_000_000}

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status"))

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/audio/transcriptions",
            "raw_path": b"/v1/audio/transcriptions",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-length", b"100000000")],
        }
        await here.app(scope, receive, send)  # type: ignore[arg-type]
        assert statuses[0] == 401
        assert num_read < 65536


async def test_of_a_hundred_megabytes_without_a_key_next_to_nothing_is_read_and_the_reply_arrives(
    file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.add("laptop")
    num_read = 0
    take = Connection.data_received

    def counted(self: Connection, data: bytes) -> None:
        nonlocal num_read
        num_read += len(data)
        take(self, data)

    monkeypatch.setattr(Connection, "data_received", counted)
    monkeypatch.setattr(server, "LINGER_S", 0.3)
    async with world(config=config(file)) as here:
        host, port = here.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n")

        async def send_all() -> None:
            for _ in range(100):
                writer.write(bytes(10**6))
                await writer.drain()

        await asyncio.sleep(0.05)  # what is there together with the head is read together with it
        sending = asyncio.create_task(send_all())
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert b" 401 " in answer.split(b"\r\n")[0]
        assert b"connection: close" in answer.lower()
        with pytest.raises(ConnectionError):  # hung up on
            await asyncio.wait_for(sending, 5)
        assert num_read < 64 * 1024


async def test_a_refused_request_with_a_small_body_leaves_its_connection_open(file: KeyFile) -> None:
    file.add("laptop")
    async with world(config=config(file)) as here:
        host, port = here.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(3):
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert b" 401 " in head.split(b"\r\n")[0]
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await asyncio.wait_for(reader.readexactly(length), 5)
            writer.write(bytes(30_000))
            await writer.drain()
        writer.close()


async def test_a_refused_request_whose_body_has_come_leaves_its_connection_open(file: KeyFile) -> None:
    _, key = file.add("laptop")
    async with world(config=config(file)) as here:
        host, port = here.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for header, status in ((b"", b" 401 "), (b"Authorization: Bearer " + key.encode() + b"\r\n", b" 200 ")):
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert status in head.split(b"\r\n")[0]
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await asyncio.wait_for(reader.readexactly(length), 5)
        writer.close()


async def test_each_key_of_the_file_sees_its_own_cache_alone(file: KeyFile) -> None:
    keys = [file.add(name)[1] for name in ("one", "two")]
    async with world(over_tcp=False, config=config(file)) as here:
        for key in (*keys, keys[0]):
            await here.client.post("/v1/chat/completions", json=BODY, headers=bearer(key))
        one, two, again = (request.cache_scope for request in here.worker.requests)
        assert one == again != two
