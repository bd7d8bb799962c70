"""The client reads events as servers write them, wherever the network cuts them."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from tests.bench.client import StreamResult, _read_events, stream_chat

DELTA = b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":90,"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


def read(*chunks: bytes) -> StreamResult:
    result = StreamResult(began_s=0.0)
    _read_events(result, [(float(index + 1), chunk) for index, chunk in enumerate(chunks)])
    return result


def test_tokens_are_counted_as_the_server_says() -> None:
    result = read(DELTA % b"one two", DELTA % b" three", USAGE + DONE)
    assert (result.num_tokens, result.num_prompt_tokens, result.is_counted_by_server) == (7, 90, True)
    assert result.text == "one two three"


def test_without_usage_the_events_are_counted_and_that_is_said() -> None:
    result = read(DELTA % b"one", DELTA % b" two", DONE)
    assert (result.num_tokens, result.is_counted_by_server) == (2, False)


def test_an_event_arrived_with_the_bytes_that_completed_it() -> None:
    event = DELTA % b"one"
    result = read(event[:9], event[9:] + (DELTA % b" two")[:5], (DELTA % b" two")[5:])
    assert result.arrivals_s == [2.0, 3.0]


def test_an_error_in_the_stream_is_an_error_of_the_reply() -> None:
    assert "overloaded" in read(b'data: {"error":{"message":"overloaded"}}\n\n').error


@pytest.mark.parametrize("ending", [b"\r\n", b"\n"])
async def test_each_piece_of_a_reply_is_announced_as_it_comes(ending: bytes) -> None:
    body = [DELTA % b"one", DELTA % b" two", USAGE, DONE]
    go_on = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert orjson.loads(await reader.read(1000)) == {"stream": True}
        assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for index, event in enumerate(body):
            event = event.replace(b"\n", ending)
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            if index == 0:
                await go_on.wait()  # set by the client: it must have been told of the first piece alone
        writer.write(b"0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        result = await stream_chat(f"http://127.0.0.1:{port}", {"stream": True}, 10, go_on.set)
    assert (result.error, result.text, result.num_tokens) == ("", "one two", 7)


async def test_a_server_that_is_not_there_is_an_error_not_an_exception() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    assert "Error" in (await stream_chat(f"http://127.0.0.1:{port}", {}, 10)).error
