"""The seam between a worker's gRPC edge and engines that speak.

Above: `inference.py`, which turns the wire into these dataclasses. Below: `workers/speaking/`. Nothing here imports
torch, onnxruntime or grpc. Such an engine fills `workers.engine.Engine` too: lifecycle is alike for all kinds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

MAX_CHARACTERS = 4096
"""Of one text; OpenAI's limit."""
MIN_SPEED, MAX_SPEED = 0.25, 4.0
"""OpenAI's bounds."""
SAMPLE_RATE_HZ = 24_000
"""Of everything that is sent, whatever the model's own rate: `pcm` has no header that could say another."""


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    """A text to be spoken.

    Attributes:
        voice: a name; empty: the model's own choice.
        format: "mp3", "opus", "aac", "flac", "wav" or "pcm".
        speed: 1.0 is the voice's own, 2.0 takes half the time.
        instructions: how to speak, for models that can be told; empty for none.
    """

    text: str = field(repr=False)
    voice: str = ""
    format: str = "mp3"
    speed: float = 1.0
    instructions: str = field(default="", repr=False)
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class AudioBytes:
    """The next bytes of the encoded stream; never empty."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SpeechFinish:
    """The last event of every served request: what the model read (symbols) and made (frames), and how long it is."""

    num_symbols: int
    num_frames: int
    duration_s: float


SpeechEvent = AudioBytes | SpeechFinish


@runtime_checkable
class Speaker(Protocol):
    """An engine that speaks."""

    def speak(self, request: SpeechRequest) -> AsyncIterator[SpeechEvent]:
        """Serve one request: bytes as they are made, then one `SpeechFinish`.

        Closing the iterator at any point frees the engine of it within a sentence.

        Raises:
            HostlerError: refused or failed; other requests are unaffected.
        """
