"""The engine for speech recognition: windows of all recordings in one queue, one thread that hears them in a batch.

Above: the worker's servicers, through `workers.engine.Engine` and `workers.transcription`. Below: `audio.py` and
`voice.py` (a file becomes windows), `batching.py` (which ones run together), `listening.py` (the thread).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

from hostler.errors import HostlerError, InvalidRequest, Overloaded, Unavailable, UnsupportedParameter

from workers.engine import EngineStats, Event, GenerationRequest, LoadSpec, ModelFacts, Prompt, TextDelta
from workers.hearing.audio import Unpacker
from workers.hearing.decoding import Wanted
from workers.hearing.listening import Listener, Recording
from workers.hearing.telling import HeardWindow, Teller
from workers.hearing.vocabulary import MAX_PROMPT_TOKENS, Vocabulary
from workers.hearing.voice import Cutter, Window
from workers.hearing.words import SOUND_S
from workers.transcription import Heard, TranscriptionFinish, TranscriptionRequest

_MAX_PROMPT_CHARS = 16 * MAX_PROMPT_TOKENS
# A recording's windows that are cut and not yet told: its samples wait in the unpacking process, not here.
_WINDOWS_AHEAD = 24


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what goes with it.

    Attributes:
        encode: text → token ids, never control tokens.
        tokenize: for the tokenizing calls.
        text_of: token ids → text.
        token_bytes: of one token.
    """

    vocabulary: Vocabulary
    facts: ModelFacts
    encode: Callable[[str], list[int]]
    tokenize: Callable[[Prompt], list[int]]
    text_of: Callable[[Sequence[int]], str]
    token_bytes: Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class _End:
    """The recording is unpacked: how many windows it has, how long it is."""

    num_windows: int
    duration_s: float


class HearingEngine:
    """Writes recordings down with one model. Create and use in one asyncio loop.

    Args:
        loaded: the model's tokens and facts.
        listener: the model's thread; the engine owns it.
        spec: limits.
    """

    def __init__(self, loaded: Loaded, listener: Listener, spec: LoadSpec) -> None:
        self._loaded = loaded
        self._listener = listener
        self._spec = spec
        self._unpacker = Unpacker()
        self._unpacker.prepare()
        self._cutting = ThreadPoolExecutor(1, thread_name_prefix="cut")
        self._num_requests = 0
        self._num_tokens = 0
        self._changed: Callable[[], None] = lambda: None
        listener.start(asyncio.get_running_loop(), lambda: self._changed())

    @property
    def facts(self) -> ModelFacts:
        """What the model is."""
        return self._loaded.facts

    def stats(self) -> EngineStats:
        """Counters as of now; running are the requests with a window in the model."""
        running = min(self._listener.num_recordings, self._num_requests)
        return EngineStats(
            num_steps=self._listener.num_steps,
            num_running=running,
            num_queued=self._num_requests - running,
            max_running=self._spec.max_running,
            num_completion_tokens_total=self._num_tokens,
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop whenever running or queued counts change."""
        self._changed = callback

    async def transcribe(self, request: TranscriptionRequest) -> AsyncIterator[Heard]:
        """Write one recording down; see `workers.transcription.Transcriber.transcribe`."""
        if self._num_requests >= self._spec.max_running + self._spec.max_queued:
            raise Overloaded(f"{self._num_requests} requests are already running or queued. Try again later.")
        self._num_requests += 1
        self._changed()
        try:
            wanted = await self._wanted(request)
            async with aclosing(self._serve(request, wanted)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        finally:
            self._num_requests -= 1
            self._changed()

    async def _wanted(self, request: TranscriptionRequest) -> Wanted:
        vocabulary = self._loaded.vocabulary
        if request.translate and not vocabulary.is_multilingual:
            raise UnsupportedParameter("This model hears English only; there is nothing to translate.", param="model")
        prompt: list[int] = []
        if text := request.prompt.strip()[-_MAX_PROMPT_CHARS:]:
            encode = self._loaded.encode
            prompt = await asyncio.get_running_loop().run_in_executor(self._cutting, encode, f" {text}")
        return Wanted(
            language=vocabulary.language(request.language) if vocabulary.is_multilingual else self._english(request),
            translate=request.translate,
            prompt=tuple(prompt[-MAX_PROMPT_TOKENS:]),
            temperature=request.temperature or None,
            times=request.segment_timestamps or request.word_timestamps,
        )

    def _english(self, request: TranscriptionRequest) -> str:
        self._loaded.vocabulary.language(request.language)
        return "en"

    async def _serve(self, request: TranscriptionRequest, wanted: Wanted) -> AsyncIterator[Heard]:
        recording = Recording(wanted, words=request.word_timestamps, request_id=request.request_id)
        room = asyncio.Semaphore(_WINDOWS_AHEAD)
        unpacking = asyncio.create_task(self._unpack(request.audio, recording, room))
        teller = Teller(
            self._loaded.vocabulary,
            self._loaded.text_of,
            token_bytes=self._loaded.token_bytes if request.logprobs else None,
            segments=wanted.times,
        )
        told = 0
        results: dict[int, HeardWindow] = {}
        end: _End | None = None
        try:
            while end is None or told < end.num_windows:
                arrived = await recording.results.get()
                if isinstance(arrived, BaseException):
                    raise arrived
                if isinstance(arrived, _End):
                    end = arrived
                    continue
                results[arrived.index] = arrived
                while told in results:
                    heard = results.pop(told)
                    told += 1
                    room.release()
                    for event in teller.tell(heard):
                        yield event
        finally:
            recording.cancelled = True
            unpacking.cancel()
            self._listener.forget(recording)
            await asyncio.gather(unpacking, return_exceptions=True)
        self._num_tokens += teller.num_tokens
        code = recording.language
        yield TranscriptionFinish(
            language=code,
            language_name=self._loaded.vocabulary.names.get(code, ""),
            duration_s=end.duration_s,
            num_prompt_tokens=len(wanted.prompt) + math.ceil(end.duration_s / SOUND_S),
            num_completion_tokens=teller.num_tokens,
        )

    async def _unpack(self, data: bytes, recording: Recording, room: asyncio.Semaphore) -> None:
        """Turn a file into windows for the listener. What goes wrong becomes the recording's result."""
        loop = asyncio.get_running_loop()
        cutter = Cutter()
        index = 0

        async def submit(windows: list[Window]) -> None:
            nonlocal index
            for window in windows:
                await room.acquire()
                self._listener.submit(recording, index, window)
                index += 1

        try:
            async with aclosing(self._unpacker.unpack(data)) as blocks:  # type: ignore[type-var]
                async for samples in blocks:
                    await submit(await loop.run_in_executor(self._cutting, cutter.feed, samples))
            await submit(await loop.run_in_executor(self._cutting, cutter.finish))
            recording.results.put_nowait(_End(index, cutter.duration_s))
        except HostlerError as error:
            recording.results.put_nowait(error)
        except RuntimeError:  # the executor is shut down
            recording.results.put_nowait(Unavailable("This model was unloaded while it listened. Try again."))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Refuse: such a model continues no text."""
        raise InvalidRequest("This model writes down speech; it does not continue text.", param="model")
        yield TextDelta("")

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the prompt's token ids."""
        return await asyncio.get_running_loop().run_in_executor(self._cutting, self._loaded.tokenize, prompt)

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return await asyncio.get_running_loop().run_in_executor(self._cutting, self._loaded.text_of, list(ids))

    async def close(self) -> None:
        """Fail what still runs, end thread and processes."""
        await self._listener.close()
        self._cutting.shutdown(wait=False)
        await self._unpacker.close()
