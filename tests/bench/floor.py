"""What the machine and the client themselves allow: memory bandwidth, and the client's cost for each event.

Above: the run (`__main__`). Below: torch for the bandwidth; a trivial SSE server in a process of its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from .client import stream_chat

_EVENT = b'data: {"id":"c","object":"chat.completion.chunk","model":"m","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'  # noqa: E501
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass(frozen=True, slots=True)
class ClientFloor:
    """What the client managed against a server that does nothing: an upper bound for every peer."""

    events_per_s: float
    cpu_us_per_event: float
    ttft_p50_s: float


def read_bandwidth_bytes_per_s(threads: int, size_bytes: int = 512 * 2**20, rounds: int = 6) -> float:
    """Return the best of some rounds of reading a block far larger than any cache (a sum, as a decode step reads)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block = torch.ones(size_bytes // 4, dtype=torch.float32)
        best_s = float("inf")
        for _ in range(rounds):
            began_s = time.perf_counter()
            block.sum()
            best_s = min(best_s, time.perf_counter() - began_s)
    finally:
        torch.set_num_threads(before)
    return size_bytes / best_s


def _serve_events(listener: socket.socket, num_events: int, ready: Connection) -> None:
    """Answer every connection with `num_events` events, each in a write and chunk of its own."""
    chunk = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_HEAD)
        for _ in range(num_events):
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, sock=listener)
        ready.send(True)
        await server.serve_forever()

    asyncio.run(main())


async def client_floor(streams: int = 16, num_events: int = 2000) -> ClientFloor:
    """Measure this client against a server that only writes."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        ours, theirs = context.Pipe()
        server = context.Process(target=_serve_events, args=(listener, num_events, theirs), daemon=True)
        server.start()
        try:
            await asyncio.to_thread(ours.recv)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            began_s, cpu_s = time.perf_counter(), time.process_time()
            results = await asyncio.gather(*(stream_chat(url, {"stream": True}, 60) for _ in range(streams)))
            spent_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        finally:
            server.kill()
            server.join(5)
    if errors := [r.error for r in results if r.error]:
        raise RuntimeError(f"the client's own measurement failed: {errors[0]}")
    total = sum(len(r.arrivals_s) for r in results)
    ttft = sorted(r.ttft_s for r in results)[len(results) // 2]
    return ClientFloor(total / spent_s, cpu_s / total * 1e6, ttft)
