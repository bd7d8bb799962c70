"""Where somebody speaks, and where a long recording is best cut. Pure; above: `engine.py`.

A recording becomes windows of at most 30 s, what Whisper hears at once. They are cut in the longest pause that the last
third of a window has, and what is silent between windows is left out. Judging errs towards speech: what is wrongly
kept costs a little time, what is wrongly left out is lost. The loudness of a frame is compared with the quietest and
the loudest that the recording had so far, so that neither a quiet recording nor a noisy room matters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from workers.hearing.audio import Samples
from workers.hearing.unpacking import SAMPLE_RATE_HZ

FRAME_S = 0.02
FRAME = int(FRAME_S * SAMPLE_RATE_HZ)
MAX_WINDOW_S = 30.0

_MAX_FRAMES = int(MAX_WINDOW_S / FRAME_S)
# Pauses in the last part of a window are where it may end.
_EARLIEST_CUT = _MAX_FRAMES * 2 // 3
_PADDING = int(0.3 / FRAME_S)
_SHORTEST_PAUSE = int(0.2 / FRAME_S)
# Shorter ones are clicks.
_SHORTEST_SPEECH = int(0.06 / FRAME_S)
_HISTORY = int(300 / FRAME_S)
_SILENCE_DB = -60.0
_FLOOR_DB = -96.0

Levels = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a recording that is heard at once.

    Attributes:
        start_s: from the recording's beginning.
        samples: int16, at most `MAX_WINDOW_S`.
    """

    start_s: float
    samples: Samples = field(repr=False)

    @property
    def duration_s(self) -> float:
        """How long it is."""
        return len(self.samples) / SAMPLE_RATE_HZ


def levels(samples: Samples) -> Levels:
    """Return (frames,) the level of each whole frame in dB of full scale, without its constant part."""
    whole = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float32)
    power = whole.var(axis=1) / np.float32(32768.0**2)
    quietest = np.float32(10 ** (_FLOOR_DB / 10))
    loudness: Levels = (10 * np.log10(np.maximum(power, quietest))).astype(np.float32)
    return loudness


def speech(loudness: Levels, history: Levels) -> npt.NDArray[np.bool_]:
    """Return (frames,) whether somebody may speak in each frame, given the levels of all that came before, too."""
    known = np.concatenate((history, loudness))
    audible = known[known > _SILENCE_DB]
    if not audible.size:
        return np.zeros(len(loudness), np.bool_)
    quiet, loud = np.percentile(known, 10), np.percentile(audible, 95)
    above = max(float(quiet), _SILENCE_DB) + float(np.clip(0.2 * (loud - quiet), 3.0, 10.0))
    # A steady sound has no quiet frames to compare with.
    return loudness > (max(above, _SILENCE_DB) if loud - quiet > 10.0 else _SILENCE_DB)


def stretches(speaking: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the stretches of speech as frames [start, end), pauses of less than 0.2 s left in, clicks left out."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], speaking, [False])).astype(np.int8)))
    found: list[tuple[int, int]] = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if found and start - found[-1][1] < _SHORTEST_PAUSE:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return [(start, end) for start, end in found if end - start >= _SHORTEST_SPEECH]


def choose_end(found: list[tuple[int, int]], loudness: Levels) -> int:
    """Return the frame at which a window that begins with the first stretch of speech ends, its padding apart.

    The longest pause between 20 and 30 s; without one the end of the last stretch that ends before; else, as
    somebody speaks on and on, the quietest moment between 20 and 30 s.
    """
    start = max(0, found[0][0] - _PADDING)
    latest = start + _MAX_FRAMES - _PADDING
    ends = [index for index, (_, end) in enumerate(found) if end <= latest]
    if ends and ends[-1] == len(found) - 1:
        return found[-1][1]
    late = [index for index in ends if found[index][1] >= start + _EARLIEST_CUT]
    if late:
        best = max(late, key=lambda index: (found[index + 1][0] - found[index][1], index))
        return found[best][1]
    if ends and found[ends[-1] + 1][0] >= start + _EARLIEST_CUT:
        return found[ends[-1]][1]
    earliest, last = start + _EARLIEST_CUT, min(latest, len(loudness))
    smooth = np.convolve(loudness[earliest:last], np.ones(5) / 5, mode="same")
    return earliest + int(np.argmin(smooth)) if smooth.size else latest


def _padded(end: int, found: list[tuple[int, int]], num_frames: int, start: int) -> int:
    """Return where a window really ends: some of the pause goes with it, the rest with what follows."""
    if any(first < end < last for first, last in found):
        return end
    following = next((first for first, _ in found if first >= end), num_frames)
    middle = num_frames if following == num_frames else (end + following) // 2
    return min(end + _PADDING, middle, start + _MAX_FRAMES)


class Cutter:
    """Cuts a recording into windows as it arrives."""

    def __init__(self) -> None:
        self._samples: Samples = np.zeros(0, np.int16)
        self._start = 0
        self._history: Levels = np.zeros(0, np.float32)
        self._num_samples = 0

    @property
    def duration_s(self) -> float:
        """How much has arrived."""
        return self._num_samples / SAMPLE_RATE_HZ

    def feed(self, samples: Samples) -> list[Window]:
        """Take the next samples; return the windows that are known by now."""
        self._num_samples += len(samples)
        self._samples = np.concatenate((self._samples, samples))
        return self._cut(is_end=False)

    def finish(self) -> list[Window]:
        """Return the windows that are left."""
        return self._cut(is_end=True)

    def _cut(self, *, is_end: bool) -> list[Window]:
        windows = []
        while len(self._samples) >= FRAME:
            loudness = levels(self._samples)
            found = stretches(speech(loudness, self._history))
            if not found:
                # What may be the first half of a frame's speech stays.
                keep = 0 if is_end else min(len(loudness), _PADDING)
                self._drop(len(loudness) - keep, loudness)
                break
            start = max(0, found[0][0] - _PADDING)
            if not is_end and len(loudness) < start + _MAX_FRAMES + _SHORTEST_PAUSE:
                self._drop(start, loudness)
                break
            end = choose_end(found, loudness)
            last = _padded(end, found, len(loudness), start)
            until = len(self._samples) if is_end and last == len(loudness) else last * FRAME
            until = min(until, (start + _MAX_FRAMES) * FRAME)
            start_s = (self._start + start * FRAME) / SAMPLE_RATE_HZ
            windows.append(Window(start_s, self._samples[start * FRAME : until].copy()))
            self._drop(last, loudness)
        return windows

    def _drop(self, num_frames: int, loudness: Levels) -> None:
        if num_frames <= 0:
            return
        self._history = np.concatenate((self._history, loudness[:num_frames]))[-_HISTORY:]
        self._samples = self._samples[num_frames * FRAME :]
        self._start += num_frames * FRAME
