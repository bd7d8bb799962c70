"""What tests do with sound: take it apart again, listen for a tone, collect an engine's events."""

from __future__ import annotations

import io
from collections.abc import AsyncIterable
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from workers.utterances import AudioBytes, SpeechEvent, SpeechFinish

Samples = npt.NDArray[np.float32]


def decoded(data: bytes, format: str) -> tuple[Samples, int]:
    """Return (samples,) and the rate in Hz of a whole stream, as FFmpeg reads it."""
    if format == "pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768, 24_000
    with av.open(io.BytesIO(data)) as container:
        resampler, parts, rate_hz = av.AudioResampler("flt", "mono"), [], 0
        for frame in container.decode(audio=0):
            rate_hz = frame.sample_rate
            parts += [out.to_ndarray()[0] for out in resampler.resample(frame)]
    samples: Samples = np.concatenate(parts)
    return samples, rate_hz


def pitch_hz(samples: Samples, rate_hz: int) -> float:
    """Return the loudest frequency."""
    spectrum: Any = np.abs(np.fft.rfft(samples))
    return float(np.argmax(spectrum) * rate_hz / len(samples))


async def collected(events: AsyncIterable[SpeechEvent]) -> tuple[bytes, SpeechFinish]:
    """Return all bytes and the last event of a request that was served."""
    data, finish = b"", None
    async for event in events:
        assert finish is None, "nothing comes after the last event"
        if isinstance(event, AudioBytes):
            data += event.data
        else:
            finish = event
    assert finish is not None
    return data, finish
