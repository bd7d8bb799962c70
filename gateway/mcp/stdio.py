"""MCP over the standard streams of a child process. Above: `connection`; below: the `mcp` package's messages.

Our own, because the package's reads a line of any length into memory and starts the child with more of our environment
than it was given. The child leads a process group, which ends with the connection: its input is closed, then it is
asked to stop, then it is killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO

import anyio
import mcp_types
from mcp.client._transport import TransportStreams
from mcp.shared.message import SessionMessage

from gateway.mcp.remote import McpFault
from gateway.mcp.wire import ByteMeter

log = logging.getLogger(__name__)

CLOSE_S = 2.0
"""How long a child may take to end by itself, and then once more when asked to."""
_CHUNK_BYTES = 64 * 1024
_TAIL_BYTES = 4096
_POLL_S = 0.02
# What programs need to run at all. The run's id lets what a killed gateway leaves behind be found.
_USUAL = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "TMPDIR", "TERM", "HOSTLER_RUN_ID")


def clean_environment(environ: Mapping[str, str], passed: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Return a child's environment: the usual few, those that are passed on, those that are given."""
    names = (*_USUAL, *passed)
    return {name: environ[name] for name in names if name in environ} | dict(given)


class Tail:
    """The last that a child wrote to its standard error, for who administers; it may hold secrets, so no log has it."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, chunk: bytes) -> None:
        """Take what was read."""
        self._bytes = (self._bytes + chunk)[-_TAIL_BYTES:]

    def clear(self) -> None:
        """Forget an earlier child's words."""
        self._bytes.clear()

    @property
    def text(self) -> str:
        """The end of it."""
        return self._bytes.decode(errors="replace").strip()


@asynccontextmanager
async def open_stdio(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path | None, meter: ByteMeter, tail: Tail
) -> AsyncIterator[TransportStreams]:
    """Start a server and yield its streams; it has ended when this does.

    Raises:
        McpFault: it cannot be started.
    """
    process = _start(command, environment, cwd)
    try:
        async with _streams(process, meter, tail) as streams:
            yield streams
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(process)


def _start(command: Sequence[str], environment: Mapping[str, str], cwd: Path | None) -> Popen[bytes]:
    # Not by the event loop: uvloop forks, and gRPC's handlers then run in a child that has none of its threads, and
    # crash. This way runs nothing of ours in the child.
    try:
        return Popen(
            command,
            env=dict(environment),
            cwd=cwd or Path.home(),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise McpFault(f"The MCP server cannot be started: there is no {command[0]!r} (or no such 'cwd').") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its command or environment is not valid"
        raise McpFault(f"The MCP server cannot be started: {reason}.") from None


@asynccontextmanager
async def _streams(process: Popen[bytes], meter: ByteMeter, tail: Tail) -> AsyncIterator[TransportStreams]:
    stdout, from_stdout = await _reader(process.stdout)
    stderr, from_stderr = await _reader(process.stderr)
    stdin = await _writer(process.stdin)
    to_session, from_server = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    to_server, from_session = anyio.create_memory_object_stream[SessionMessage](0)

    async def read() -> None:
        async with to_session:
            with suppress(McpFault, anyio.BrokenResourceError, anyio.ClosedResourceError, ConnectionError):
                async for line in _lines(stdout, meter):
                    if (message := _parsed(line)) is not None:
                        await to_session.send(message)
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S * 10):
                    await _ended(process)
            how = "" if process.returncode is None else f" with exit code {process.returncode}"
            meter.fail(McpFault(f"The MCP server ended{how}."))

    async def write() -> None:
        with suppress(OSError, anyio.ClosedResourceError):
            async for message in from_session:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                stdin.write(text.encode(errors="replace") + b"\n")
                await stdin.drain()

    async def read_errors() -> None:
        while chunk := await stderr.read(_CHUNK_BYTES):
            tail.add(chunk)

    async with anyio.create_task_group() as group:
        for work in (read, write, read_errors):
            group.start_soon(work)
        try:
            yield from_server, to_server
        finally:
            stdin.close()
            with anyio.CancelScope(shield=True):
                await _stop(process)
            for stream in (from_server, to_server, from_session):
                await stream.aclose()
            for transport in (from_stdout, from_stderr):
                transport.close()
            group.cancel_scope.cancel()


async def _reader(pipe: IO[bytes] | None) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader, transport


async def _writer(pipe: IO[bytes] | None) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, pipe)
    return asyncio.StreamWriter(transport, protocol, None, loop)


async def _lines(stream: asyncio.StreamReader, meter: ByteMeter) -> AsyncIterator[bytes]:
    rest = bytearray()
    while chunk := await stream.read(_CHUNK_BYTES):
        meter.take(len(chunk))
        first, *others = chunk.split(b"\n")
        rest += first
        for other in others:
            yield bytes(rest)
            rest = bytearray(other)


def _parsed(line: bytes) -> SessionMessage | None:
    """Return a message; None for what is none: servers print other things, too."""
    if not line.strip():
        return None
    try:
        return SessionMessage(mcp_types.jsonrpc_message_adapter.validate_json(line, by_name=False))
    except (ValueError, RecursionError):
        return None


async def _ended(process: Popen[bytes]) -> None:
    while process.poll() is None:  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)


async def _stop(process: Popen[bytes]) -> None:
    """Wait for a child whose input is closed, and end it if that takes too long; its heirs in any case."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            _signal(process, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await _ended(process)
        if process.returncode is not None:
            break
    _signal(process, signal.SIGKILL)


def _signal(process: Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
