"""The thread that hears: takes waiting windows, encodes them, runs the decode loop, hands results back.

Above: `engine.py`, which submits from its asyncio loop. Below: `batching.py`, `decoding.py`, `whisper.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hostler.errors import HostlerError, Internal, OutOfMemory, Unavailable

from workers.hearing.audio import Samples
from workers.hearing.batching import Waiting, choose_joining
from workers.hearing.decoding import Decoding, Row, Wanted
from workers.hearing.telling import HeardWindow
from workers.hearing.voice import Window
from workers.hearing.whisper import Whisper
from workers.hearing.words import SOUND_S, token_starts_s

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0002
_NUMBERS = itertools.count()
# The store's estimate of a footprint counts the activations of two in float32.
_CPU_WINDOWS_AT_ONCE, _GPU_WINDOWS_AT_ONCE = 2, 4

Features = Callable[[Sequence[Samples]], torch.Tensor]
"""Windows' samples → (windows, mels, frames) float32, filled up with silence."""


@dataclass(eq=False, slots=True)
class Recording:
    """One request. `cancelled` may be set by any thread; `language` is set by the listener's.

    Attributes:
        words: when each word was spoken is wanted.
        results: `HeardWindow`s as they are done, or what ended the recording.
    """

    wanted: Wanted
    words: bool
    request_id: str
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    language: str = ""
    number: int = field(default_factory=lambda: next(_NUMBERS))

    def __post_init__(self) -> None:
        self.language = self.wanted.language


@dataclass(frozen=True, eq=False, slots=True)
class _Item:
    recording: Recording
    index: int
    window: Window


@dataclass(frozen=True, slots=True)
class Threads:
    """CPU threads for the encoder and for decode steps."""

    encoder: int = 1
    decoder: int = 1


class Listener:
    """Owns a model and the thread that runs it.

    Args:
        whisper: the model.
        decoding: its rows.
        features: what the encoder gets of samples.
        alignment_heads: (layer, head) that follow the speech.
        threads: how many to use on a CPU.
    """

    def __init__(
        self,
        whisper: Whisper,
        decoding: Decoding[_Item],
        features: Features,
        alignment_heads: Sequence[tuple[int, int]],
        threads: Threads,
    ) -> None:
        self._whisper = whisper
        self._decoding = decoding
        self._features = features
        self._heads = alignment_heads
        self._threads = threads
        self._at_once = _CPU_WINDOWS_AT_ONCE if whisper.device.type == "cpu" else _GPU_WINDOWS_AT_ONCE
        self._waiting: list[_Item] = []
        self._arrived = threading.Condition()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: Callable[[], None] = lambda: None
        self._recordings: set[Recording] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.num_steps = 0
        self.num_recordings = 0

    # ------------------------------------------------------------ asyncio side

    def warm_up(self) -> None:
        """Use all memory that serving will, once. Blocking; before `start`."""
        torch.set_num_threads(self._threads.encoder)
        self._whisper.warm_up(self._at_once)

    def start(self, loop: asyncio.AbstractEventLoop, changed: Callable[[], None]) -> None:
        """Begin; `changed` is called in the loop when recordings begin or stop running."""
        self._loop, self._changed = loop, changed
        self._thread.start()

    def submit(self, recording: Recording, index: int, window: Window) -> None:
        """Queue one window of a recording."""
        if self._closing:
            raise Unavailable("This model is being unloaded. Try again.")
        self._recordings.add(recording)
        with self._arrived:
            self._waiting.append(_Item(recording, index, window))
            self._arrived.notify()

    def forget(self, recording: Recording) -> None:
        """Drop what a cancelled recording still has, within one step."""
        self._recordings.discard(recording)
        with self._arrived:
            self._arrived.notify()

    async def close(self) -> None:
        """End the thread; fail what still runs."""
        self._closing = True
        with self._arrived:
            self._arrived.notify()
        await asyncio.to_thread(self._thread.join, 20.0)
        for recording in list(self._recordings):
            recording.results.put_nowait(Unavailable("This model was unloaded while it listened. Try again."))

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        # Every operator takes the interpreter lock again; at Python's 5 ms a busy asyncio thread would hold a step up.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        with torch.inference_mode():
            self._hear()

    def _hear(self) -> None:
        while (joining := self._next()) is not None:
            if joining:
                self._join(joining)
            if self._decoding.rows:
                self._step()
            self._count()

    def _next(self) -> list[_Item] | None:
        """Return the windows that join now; wait where there is nothing to do. None at the end."""
        rows = self._decoding.rows
        gone = [row for row in rows if row.item.recording.cancelled]
        self._decoding.leave(gone)
        with self._arrived:
            while True:
                if self._closing:
                    return None
                self._waiting = [item for item in self._waiting if not item.recording.cancelled]
                places = choose_joining(
                    [Waiting(i.recording.number, i.index, bool(i.recording.language)) for i in self._waiting],
                    num_running=len(rows),
                    num_first_running=sum(row.item.index == 0 for row in rows),
                    num_rows=self._whisper.num_rows,
                    at_most=self._at_once,
                )
                if places or rows:
                    break
                self._arrived.wait()
            joining = [self._waiting[place] for place in places]
            taken = set(places)
            self._waiting = [item for place, item in enumerate(self._waiting) if place not in taken]
        return joining

    def _join(self, items: list[_Item]) -> None:
        """Encode windows and add their rows; where that fails, each alone, so that only the culprit's request fails."""
        try:
            self._attempt(items)
        except Exception as error:  # any failure of the model must cost one request, never the engine
            self._decoding.leave([row for row in self._decoding.rows if row.item in items])
            if len(items) > 1:
                for item in items:
                    self._join([item])
            else:
                self._fail(items[0].recording, self._explained(error, items[0].recording))

    def _attempt(self, items: list[_Item]) -> None:
        torch.set_num_threads(self._threads.encoder)
        features = self._features([item.window.samples for item in items])
        states = self._whisper.encode(features)
        self.num_steps += 1
        wanted = [(item, _with(item)) for item in items]
        for row in self._decoding.join(wanted, states):
            row.item.recording.language = row.language

    def _step(self) -> None:
        torch.set_num_threads(self._threads.decoder)
        try:
            done = self._decoding.step()
            self.num_steps += 1
            results = [(row.item.recording, row.failure or self._heard(row)) for row in done]
            self._decoding.leave(done)
            for recording, result in results:
                self._tell(recording, result)
        except Exception as error:
            rows = list(self._decoding.rows)
            self._decoding.leave(rows)
            for recording in {row.item.recording for row in rows}:
                self._fail(recording, self._explained(error, recording))

    def _heard(self, row: Row[_Item]) -> HeardWindow:
        item, decoded = row.item, row.tries[-1]
        starts_s = None
        words = [token for token in decoded.tokens if token < self._decoding.vocabulary.end]
        if item.recording.words and words:
            opening = self._decoding.vocabulary.opening(
                row.language, translate=row.wanted.translate, times=False, prompt=[]
            )
            tokens = [*opening, *words, self._decoding.vocabulary.end]
            num_sounds = max(1, min(self._whisper.shape.num_sounds, round(item.window.duration_s / SOUND_S)))
            attention = self._whisper.attend(self._decoding.rows.index(row), tokens, self._heads, num_sounds)
            starts_s = token_starts_s(attention, len(opening) - 1)
        return HeardWindow(item.index, item.window.start_s, item.window.duration_s, row.language, decoded, starts_s)

    def _explained(self, error: Exception, recording: Recording) -> HostlerError:
        log.exception("hearing failed", exc_info=error, extra={"request_id": recording.request_id})
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return OutOfMemory("Memory ran out while this request was served. Try again.")
        return Internal("The model failed on this request; the server's log has the details.")

    def _fail(self, recording: Recording, error: HostlerError) -> None:
        recording.cancelled = True
        self._tell(recording, error)

    def _tell(self, recording: Recording, result: HeardWindow | HostlerError) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(recording.results.put_nowait, result)

    def _count(self) -> None:
        number = len({row.item.recording for row in self._decoding.rows})
        if number != self.num_recordings:
            self.num_recordings = number
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._changed)


def _with(item: _Item) -> Wanted:
    """Return how a window is wanted, in the language that its recording turned out to be in."""
    return replace(item.recording.wanted, language=item.recording.language, seed=item.index)


def as_floats(samples: Samples) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return samples between -1 and 1."""
    return samples.astype(np.float32) / np.float32(32768)
