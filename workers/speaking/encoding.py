"""Sound into the formats that clients ask for, piece by piece, while it is being made.

Above: the engine's thread. Below: PyAV (FFmpeg's encoders and muxers). Nothing is ever read back: lengths in headers
that would have to be written last are left as "unknown", as every streaming server does. A `wav` therefore begins with
44 bytes whose sizes are 0xFFFFFFFF.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import av
import av.audio
import numpy as np
from hostler.errors import UnsupportedParameter

from workers.speaking.models import Waveform
from workers.utterances import SAMPLE_RATE_HZ

# Otherwise a muxer collects 32 KiB before it writes, which is seconds of speech.
_MUXER_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Format:
    """How a format is made: FFmpeg's container and codec, the bit rate (0: lossless), options of the container."""

    container: str
    codec: str
    bit_rate: int = 0
    options: dict[str, str] = field(default_factory=dict)


FORMATS: dict[str, Format] = {
    "mp3": Format("mp3", "libmp3lame", 96_000, {"write_xing": "0", "id3v2_version": "0"}),
    # A page of Ogg is a second unless told otherwise.
    "opus": Format("ogg", "libopus", 48_000, {"page_duration": "100000"}),
    "aac": Format("adts", "aac", 64_000),
    "flac": Format("flac", "flac"),
    "wav": Format("wav", "pcm_s16le"),
    "pcm": Format("s16le", "pcm_s16le"),
}


def format_of(name: str) -> Format:
    """Return how a format is made.

    Raises:
        UnsupportedParameter: it is not made here.
    """
    if name not in FORMATS:
        raise UnsupportedParameter(
            f"The format {name[:40]!r} is not made here; {', '.join(FORMATS)} are.", param="response_format"
        )
    return FORMATS[name]


class AudioEncoder:
    """Encodes one stream of sound. Not thread-safe.

    Args:
        name: one of `FORMATS`.
        sample_rate_hz: of what comes in; `SAMPLE_RATE_HZ` goes out, in one channel.

    Raises:
        UnsupportedParameter: no such format.
    """

    def __init__(self, name: str, sample_rate_hz: int) -> None:
        wanted = format_of(name)
        self._rate_hz = sample_rate_hz
        self._sink = _Sink()
        options = {"fflags": "bitexact", "flush_packets": "1", **wanted.options}
        self._container = av.open(self._sink, "w", format=wanted.container, options=options, buffer_size=_MUXER_BYTES)
        stream = self._container.add_stream(wanted.codec, rate=SAMPLE_RATE_HZ, layout="mono")
        assert isinstance(stream, av.audio.AudioStream)
        if wanted.bit_rate:
            stream.bit_rate = wanted.bit_rate
        self._stream = stream
        self._resampler = av.AudioResampler(stream.codec_context.format.name, "mono", SAMPLE_RATE_HZ)

    def encode(self, waveform: Waveform) -> bytes:
        """Return the bytes that are ready once `waveform` (samples,) is in, perhaps none."""
        frame = av.AudioFrame.from_ndarray(np.clip(waveform, -1.0, 1.0)[None, :], format="flt", layout="mono")
        frame.sample_rate = self._rate_hz
        self._put(frame)
        return self._sink.take()

    def finish(self) -> bytes:
        """Return the rest. The encoder is of no further use."""
        self._put(None)
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._sink.take()

    def _put(self, frame: av.AudioFrame | None) -> None:
        for resampled in self._resampler.resample(frame):
            self._container.mux(self._stream.encode(resampled))


class _Sink:
    """What FFmpeg writes to; it cannot seek, and so does not try."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken
