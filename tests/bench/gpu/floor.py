"""What a card's memory allows: the bytes that a decode step must read, and how near a measured step comes to that.

Arithmetic alone. Above: the steps that measure. Below: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

DECODE_GOAL = 0.70
"""Share of the floor that decoding must reach."""
MOVING_GOAL = 0.80
"""Share of the measured host-to-device bandwidth that loading and waking must reach."""
PEER_GOAL = 1.0
"""Throughput over that of transformers' continuous batching."""


@dataclass(frozen=True, slots=True)
class DecodeFloor:
    """One decode step against the memory's bandwidth.

    Attributes:
        weight_bytes: that every step reads once, however many rows it has: all but the table of input embeddings, of
            which a step reads one line for each row.
        kv_bytes: keys and values of all rows together, read once each.
        bandwidth_bytes_per_s: of the device's memory, measured in the same run.
    """

    weight_bytes: float
    kv_bytes: float
    bandwidth_bytes_per_s: float

    @property
    def step_s(self) -> float:
        """The shortest time that the step can take."""
        return (self.weight_bytes + self.kv_bytes) / self.bandwidth_bytes_per_s

    def share(self, measured_s: float) -> float:
        """Return the part of the floor that a step of `measured_s` reaches; 1 is as fast as memory allows."""
        return self.step_s / measured_s


def weights_read(weight_bytes: int, embedding_bytes: int, *, tied: bool) -> int:
    """Return the bytes of weights that one step reads: a tied embedding is the output projection, too."""
    return weight_bytes if tied else weight_bytes - embedding_bytes


def rate(num_bytes: float, seconds: float) -> str:
    """Return a rate as a reader wants it."""
    per_s = num_bytes / seconds
    return f"{per_s / 1e12:.2f} TB/s" if per_s >= 1e12 else f"{per_s / 1e9:.1f} GB/s"
