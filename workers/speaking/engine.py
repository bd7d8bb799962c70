"""The engine for text to speech: texts of all requests take turns, piece by piece, in one thread that owns the model.

Above: the worker's servicers, through `workers.engine.Engine` and `workers.utterances`. Below: `sentences.py` (where a
text is cut), `turns.py` (who goes next), a `SpeechModel`, `encoding.py`. The thread makes sound and encodes it; the
asyncio side submits, takes bytes out, and lets go of what nobody waits for any more.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from hostler.errors import (
    HostlerError,
    Internal,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    Unavailable,
    UnsupportedParameter,
)

from workers.engine import EngineStats, Event, GenerationRequest, LoadSpec, ModelFacts, Prompt
from workers.speaking.encoding import AudioEncoder, format_of
from workers.speaking.models import SpeechModel, Symbols, Waveform
from workers.speaking.sentences import cut
from workers.speaking.turns import Turn, next_turn, start_s
from workers.speaking.voices import choose_voice
from workers.utterances import (
    MAX_CHARACTERS,
    MAX_SPEED,
    MIN_SPEED,
    AudioBytes,
    SpeechEvent,
    SpeechFinish,
    SpeechRequest,
)

log = logging.getLogger(__name__)

MAX_UNREAD_BYTES = 256 * 1024
"""A request whose client is so far behind makes no more sound until it has read some."""

_NOTHING_TO_SAY = "Invalid 'input': it holds nothing that this model's voice can say."


@dataclass(eq=False, slots=True)
class _Job:
    """One request on its way. The thread changes the middle part; `cancelled` may be set by any thread."""

    request: SpeechRequest
    arrival: int
    voice: int
    made_s: float
    events: asyncio.Queue[SpeechEvent | HostlerError] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    began: bool = False

    encoder: AudioEncoder | None = None
    texts: deque[str] = field(default_factory=deque)
    pieces: deque[Symbols] = field(default_factory=deque)
    num_symbols: int = 0
    num_samples: int = 0

    num_unread_bytes: int = 0  # guarded by the engine's condition

    @property
    def turn(self) -> Turn:
        """What decides whose turn it is."""
        return Turn(self.arrival, self.made_s, is_full=self.num_unread_bytes >= MAX_UNREAD_BYTES)


class SpeakingEngine:
    """Serves one text-to-speech model. Create and use in one asyncio loop; it closes the model in the end.

    Args:
        model: the model; from here on the engine's thread alone uses it.
        facts: what it is.
        spec: limits.
    """

    def __init__(self, model: SpeechModel, facts: ModelFacts, spec: LoadSpec) -> None:
        self._model = model
        self._facts = facts
        self._spec = spec
        self._asyncio = asyncio.get_running_loop()
        self._changed: Callable[[], None] = lambda: None
        self._num_steps = 0
        self._num_symbols = 0
        self._num_frames = 0
        self._num_arrived = 0
        self._jobs: list[_Job] = []
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ asyncio side

    @property
    def facts(self) -> ModelFacts:
        """What the model is."""
        return self._facts

    def stats(self) -> EngineStats:
        """Counters as of now; running are the requests of which something has been said."""
        running = sum(job.began for job in self._jobs)
        return EngineStats(
            num_steps=self._num_steps,
            num_running=running,
            num_queued=len(self._jobs) - running,
            max_running=self._spec.max_running,
            num_prompt_tokens_total=self._num_symbols,
            num_completion_tokens_total=self._num_frames,
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop whenever running or queued counts change."""
        self._changed = callback

    async def speak(self, request: SpeechRequest) -> AsyncIterator[SpeechEvent]:
        """Serve one request; see `workers.utterances.Speaker.speak`."""
        job = self._admit(request)
        self._changed()
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, HostlerError):
                    raise event
                yield event
                if isinstance(event, SpeechFinish):
                    return
                with self._news:
                    job.num_unread_bytes -= len(event.data)
                    self._news.notify()
        finally:
            with self._news:
                job.cancelled = True
                if job in self._jobs:
                    self._jobs.remove(job)
                self._news.notify()
            self._changed()

    def _admit(self, request: SpeechRequest) -> _Job:
        voice = choose_voice(self._facts.voices, request.voice)
        format_of(request.format)
        if not MIN_SPEED <= request.speed <= MAX_SPEED:
            raise InvalidRequest(f"Invalid 'speed': expected {MIN_SPEED} to {MAX_SPEED:g}.", param="speed")
        if request.instructions:
            raise UnsupportedParameter("This model cannot be told how to speak.", param="instructions")
        if len(request.text) > MAX_CHARACTERS:
            raise InvalidRequest(f"Invalid 'input': more than {MAX_CHARACTERS} characters.", param="input")
        texts = cut(request.text)
        if not texts:
            raise InvalidRequest(_NOTHING_TO_SAY, param="input")
        if self._closing:
            raise Unavailable("This model is being unloaded. Try again.")
        if len(self._jobs) >= self._spec.max_running + self._spec.max_queued:
            raise Overloaded(f"{len(self._jobs)} requests are already running or queued. Try again later.")
        self._num_arrived += 1
        with self._news:
            made_s = start_s([job.turn for job in self._jobs])
            job = _Job(request, self._num_arrived, voice, made_s, texts=deque(texts))
            self._jobs.append(job)
            self._news.notify()
        return job

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Refuse: such a model writes no text."""
        raise InvalidRequest("This model speaks; it does not write text.", param="model")
        yield

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Refuse: what it reads are sounds or letters, not tokens of a text."""
        raise InvalidRequest("This model speaks; it has no tokens.", param="model")

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Refuse, as `tokenize`."""
        raise InvalidRequest("This model speaks; it has no tokens.", param="model")

    async def close(self) -> None:
        """Fail what still runs, end the thread and the model."""
        with self._news:
            self._closing = True
            self._news.notify()
        await asyncio.to_thread(self._thread.join, 10.0)
        for job in list(self._jobs):
            job.events.put_nowait(Unavailable("This model was unloaded while it spoke. Try again."))

    # ------------------------------------------------------------ engine thread

    def _loop(self) -> None:
        try:
            self._model.prepare()
            while (job := self._next()) is not None:
                self._advance(job)
        finally:
            self._model.close()

    def _next(self) -> _Job | None:
        """Wait for somebody's turn; None at the end."""
        with self._news:
            while not self._closing:
                turns = {job.arrival: job for job in self._jobs if not job.cancelled}
                turn = next_turn([job.turn for job in turns.values()], self._spec.max_running)
                if turn is not None:
                    return turns[turn.arrival]
                self._news.wait()
        return None

    def _advance(self, job: _Job) -> None:
        """Say the next piece of a request. Whatever fails costs that request and no other."""
        try:
            self._say_next(job)
        except HostlerError as error:
            self._end(job, error)
        except Exception as error:
            log.exception("speaking failed", extra={"request_id": job.request.request_id})
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                self._end(job, OutOfMemory("Memory ran out while this text was spoken. Try again."))
            else:
                self._end(job, Internal("The model failed on this request; the server's log has the details."))

    def _say_next(self, job: _Job) -> None:
        while job.texts and not job.pieces:
            job.pieces.extend(self._model.read(job.texts.popleft()))
        if not job.pieces:
            raise InvalidRequest(_NOTHING_TO_SAY, param="input")
        if not job.began:
            self._tell(self._begin, job)
        symbols = job.pieces.popleft()
        waveform = self._model.speak(symbols, job.voice, job.request.speed)
        if not np.isfinite(waveform).all():
            raise Internal("The model produced no valid numbers for this request.")
        self._count(job, symbols, waveform)
        encoder = job.encoder = job.encoder or AudioEncoder(job.request.format, self._model.sample_rate_hz)
        data = encoder.encode(waveform)
        # What comes next is read now, so that the last piece is known to be the last.
        while job.texts and not job.pieces:
            job.pieces.extend(self._model.read(job.texts.popleft()))
        if job.pieces:
            self._give(job, data)
            return
        self._give(job, data + encoder.finish())
        self._end(job, self._finish(job))

    def _count(self, job: _Job, symbols: Symbols, waveform: Waveform) -> None:
        job.num_symbols += len(symbols)
        job.num_samples += len(waveform)
        job.made_s += len(waveform) / self._model.sample_rate_hz
        self._num_steps += 1
        self._num_symbols += len(symbols)
        self._num_frames += len(waveform) // self._model.frame_samples

    def _finish(self, job: _Job) -> SpeechFinish:
        model = self._model
        return SpeechFinish(
            job.num_symbols, job.num_samples // model.frame_samples, job.num_samples / model.sample_rate_hz
        )

    def _give(self, job: _Job, data: bytes) -> None:
        if data:
            with self._news:
                job.num_unread_bytes += len(data)
            self._tell(job.events.put_nowait, AudioBytes(data))

    def _end(self, job: _Job, event: SpeechEvent | HostlerError) -> None:
        job.cancelled = True
        self._tell(job.events.put_nowait, event)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        if not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(callback, *arguments)

    # ------------------------------------------------------------ back in the loop

    def _begin(self, job: _Job) -> None:
        job.began = True
        self._changed()
