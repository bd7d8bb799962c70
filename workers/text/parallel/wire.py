"""What the first rank and its followers say to each other beside the collectives, over an inherited Unix socket pair.

Above: `followers.py` and `follower.py`. Below: sockets. A frame is a kind (one byte), a length (four) and a body: JSON,
or the arrays of a step as they lie in memory. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from enum import IntEnum
from typing import Any

import numpy as np

from workers.text.packing import PackedStep

_FRAME = struct.Struct("<BI")
_STEP = struct.Struct("<5I")


class Kind(IntEnum):
    """What a frame is.

    To a follower: TASK, LOAD, then STEP and RESIZE for ever. From it: PREPARED, READY, or FAILED instead; then RESIZED
    for each RESIZE.
    """

    TASK = 1
    PREPARED = 2
    LOAD = 3
    READY = 4
    FAILED = 5
    STEP = 6
    RESIZE = 7
    RESIZED = 8


class Channel:
    """One end of the pair. One thread sends, one receives.

    Args:
        end: a connected stream socket; its time-out bounds both.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """Send one frame.

        Raises:
            OSError: the other end is gone, or does not read (`TimeoutError`).
        """
        self._end.sendall(_FRAME.pack(kind, len(body)) + body)

    def tell(self, kind: Kind, **fields: Any) -> None:
        """Send fields as JSON; see `send`."""
        self.send(kind, json.dumps(fields).encode())

    def receive(self) -> tuple[Kind, bytes] | None:
        """Return the next frame; None once the other end is closed.

        Raises:
            OSError: the connection broke, or nothing came within the socket's time-out (`TimeoutError`).
        """
        head = self._exactly(_FRAME.size)
        if head is None:
            return None
        kind, length = _FRAME.unpack(head)
        body = self._exactly(length)
        return None if body is None else (Kind(kind), body)

    def _exactly(self, num_bytes: int) -> bytes | None:
        got = bytearray()
        while len(got) < num_bytes:
            piece = self._end.recv(num_bytes - len(got))
            if not piece:
                return None
            got += piece
        return bytes(got)

    def close(self) -> None:
        """Close this end: the other one then reads that it is alone."""
        with contextlib.suppress(OSError):  # The other end was first.
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()

    def limit(self, timeout_s: float) -> None:
        """Bound every later send and receive."""
        self._end.settimeout(timeout_s)


def encode_step(packed: PackedStep) -> bytes:
    """Return the arrays of a step; adapters and pictures do not travel."""
    assert packed.adapters is None, "a split model has no adapters"
    num_works, num_blocks = packed.tables.shape
    head = _STEP.pack(packed.tokens.size, num_works, num_blocks, packed.logit_rows.size, packed.num_singles)
    arrays = (packed.tokens, packed.positions, packed.sequences, packed.tables, packed.logit_rows)
    return head + b"".join(np.ascontiguousarray(array, np.int32).tobytes() for array in arrays)


def decode_step(body: bytes) -> PackedStep:
    """Return the step of `encode_step`.

    Raises:
        ValueError: its length is not what it says.
    """
    num_rows, num_works, num_blocks, num_wanted, num_singles = _STEP.unpack_from(body)
    numbers = np.frombuffer(body, np.int32, offset=_STEP.size).copy()
    sizes = (num_rows, num_rows, num_works * 4, num_works * num_blocks, num_wanted)
    if sum(sizes) != numbers.size:
        raise ValueError(f"a step of {numbers.size} numbers says that it has {sum(sizes)}")
    tokens, positions, sequences, tables, logit_rows = np.split(numbers, np.cumsum(sizes)[:-1])
    return PackedStep(
        tokens=tokens,
        positions=positions,
        sequences=sequences.reshape(num_works, 4),
        tables=tables.reshape(num_works, num_blocks),
        logit_rows=logit_rows,
        num_singles=num_singles,
    )
