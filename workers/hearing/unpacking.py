"""Unpacks one recording: `python -m workers.hearing.unpacking < FILE > SAMPLES`. A process of its own, for one file.

Above: `audio.py`, which starts it, reads its samples and its exit status. Below: PyAV (FFmpeg's decoders). What comes
in is hostile: everything that the process may use is bounded before the first byte is looked at, only plain containers
are opened, and nothing but the standard input is ever read. Samples leave as 16-bit little-endian mono at 16 kHz.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
import wave
from collections.abc import Iterator
from typing import Any

SAMPLE_RATE_HZ = 16_000
MAX_SECONDS = 4 * 3600
MAX_FILE_BYTES = 26_214_400 + 1

UNREADABLE, NO_AUDIO, TOO_LONG = 40, 41, 42
"""Exit statuses: FFmpeg reads none of it; it holds no sound; it holds more than `MAX_SECONDS`."""

_MEMORY_BYTES = 1536 * 2**20
_CPU_S = 240
_MAX_FAULTS = 200
_PR_SET_PDEATHSIG = 1
# Those that hold their sound themselves. Playlists and the like would make FFmpeg open further files and addresses.
_CONTAINERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,asf_o,au,avi,caf,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,"
    "mp3,mpeg,mpegts,ogg,opus,rm,tta,voc,w64,wav,wv,xwma"
)


def confine() -> None:
    """Give up what decoding does not need. Called once, after the imports; there is no way back."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Every further file or socket fails to open.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    os.chdir("/")


def die_with_parent() -> None:
    """Ask the kernel to end this process when the thread that started it ends. Does nothing but on Linux."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def blocks(av: Any, data: bytes) -> Iterator[bytes]:
    """Yield the samples of the first audio stream, resampled, a frame at a time. Damaged packets are skipped.

    Raises:
        SystemExit: with one of the statuses above.
    """
    try:
        container = av.open(io.BytesIO(data), options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"})
    except Exception:  # every decoder has its own
        sys.exit(UNREADABLE)
    with container:
        if not container.streams.audio:
            sys.exit(NO_AUDIO)
        stream = container.streams.audio[0]
        if container.duration and container.duration / 1e6 > MAX_SECONDS:
            sys.exit(TOO_LONG)
        stream.codec_context.thread_count = 1
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
        for frame in _frames(av, container, stream):
            for out in resampler.resample(frame):
                yield bytes(out.planes[0])[: 2 * out.samples]
        for out in resampler.resample(None):
            yield bytes(out.planes[0])[: 2 * out.samples]


def _frames(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    packets = container.demux(stream)
    num_faults = 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError:  # cut short: what came before it is good
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            num_faults += 1
            if num_faults > _MAX_FAULTS:
                return
            continue
        for frame in frames:
            frame.pts = None  # a broken clock must not make the resampler invent silence
            yield frame


def _silent_wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(4 * 800))
    return buffer.getvalue()


def main() -> int:
    """Unpack standard input to standard output; return the exit status."""
    die_with_parent()
    import av
    import av.error

    av.logging.set_level(av.logging.PANIC)
    # PyAV imports parts of itself when they are first used; afterwards no file can be opened.
    for _ in blocks(av, _silent_wav()):
        pass
    confine()
    data = sys.stdin.buffer.read(MAX_FILE_BYTES)
    num_bytes = 0
    out = sys.stdout.buffer
    for block in blocks(av, data):
        num_bytes += len(block)
        if num_bytes > 2 * SAMPLE_RATE_HZ * MAX_SECONDS:
            return TOO_LONG
        out.write(block)
    out.flush()
    return 0 if num_bytes else NO_AUDIO


if __name__ == "__main__":
    try:
        STATUS = main()
    except BrokenPipeError:
        STATUS = 1
    # Past the interpreter's own tidying: with no files left to open it could only fail.
    os._exit(STATUS)
