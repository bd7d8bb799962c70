"""Recordings → samples, through a child process for each. Above: `engine.py`. Below: `unpacking.py`, the child.

The child starts before it has a file, while another request is served: an interpreter with FFmpeg takes a quarter of
a second to come up. Its output is read as it comes and only as fast as it is used, so that a recording of hours
never lies here whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import numpy.typing as npt
from hostler.errors import InvalidRequest, OutOfMemory, Unavailable

from workers.hearing.unpacking import MAX_SECONDS, NO_AUDIO, TOO_LONG, UNREADABLE

Samples = npt.NDArray[np.int16]

BLOCK_S = 5
_BLOCK_BYTES = 2 * 16_000 * BLOCK_S
# Longest time without a sample while somebody waits for one. The child's own bound is processor time.
_SILENT_S = 60.0
_REASONS = {
    UNREADABLE: "The file is not audio in a container that can be read here, or it is damaged.",
    NO_AUDIO: "The file holds no sound.",
    TOO_LONG: f"The recording is longer than {MAX_SECONDS // 3600} hours. Send it in parts.",
}


class Unpacker:
    """Unpacks recordings, each in a process of its own, and keeps one process ready. For one event loop."""

    def __init__(self) -> None:
        self._spare: asyncio.Task[asyncio.subprocess.Process] | None = None
        self._closed = False

    def prepare(self) -> None:
        """Have a process ready for the next recording."""
        if self._spare is None and not self._closed:
            self._spare = asyncio.get_running_loop().create_task(_start())
            self._spare.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def unpack(self, data: bytes) -> AsyncIterator[Samples]:
        """Yield a recording's samples, int16 mono at 16 kHz, about `BLOCK_S` seconds at a time.

        What is cut short or damaged is read as far as it goes. Closing the iterator ends the process.

        Raises:
            InvalidRequest: it is no recording, holds no sound, or is too long.
        """
        process = await self._take()
        assert process.stdin is not None
        assert process.stdout is not None
        feeding = asyncio.create_task(_feed(process.stdin, data))
        try:
            while block := await _block(process.stdout):
                yield np.frombuffer(block, np.int16)
            status = await process.wait()
            if status:
                raise _refusal(status)
        finally:
            feeding.cancel()
            await _end(process)

    async def _take(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise Unavailable("This model is being unloaded. Try again.")
        self.prepare()
        spare, self._spare = self._spare, None
        assert spare is not None
        self.prepare()
        process = await spare
        # One that the system has ended while it waited (for memory, say) is nobody's fault.
        return process if process.returncode is None else await _start()

    async def close(self) -> None:
        """End the process that waits."""
        self._closed = True
        if self._spare is not None:
            with contextlib.suppress(Exception):
                await _end(await self._spare)


async def _start() -> asyncio.subprocess.Process:
    environment = {key: value for key, value in os.environ.items() if key.startswith(("PYTHON", "LD_", "PATH"))}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "workers.hearing.unpacking",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        limit=4 * _BLOCK_BYTES,
    )


async def _feed(pipe: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(OSError):
        pipe.write(data)
        await pipe.drain()
    with contextlib.suppress(OSError):
        pipe.close()


async def _block(pipe: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(_SILENT_S):
            return await pipe.readexactly(_BLOCK_BYTES)
    except asyncio.IncompleteReadError as rest:
        return rest.partial[: len(rest.partial) // 2 * 2]
    except TimeoutError:
        raise InvalidRequest("The file could not be decoded in reasonable time.", param="file") from None


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    transport: Any = getattr(process, "_transport", None)
    await process.wait()
    if transport is not None:
        transport.close()


def _refusal(status: int) -> InvalidRequest | OutOfMemory:
    """Return what an exit status amounts to. A decoder that crashed, or was stopped at a bound, found a bad file."""
    if status == -signal.SIGKILL:
        return OutOfMemory("Memory ran out while the file was decoded. Try again.")
    return InvalidRequest(
        _REASONS.get(status, "The file could not be decoded: it is damaged, or takes more than its size allows."),
        param="file",
    )
