"""The seam between a worker's gRPC edge and engines that turn speech into text.

Above: `inference.py`, which turns the wire into these dataclasses. Below: `workers/hearing/`. Nothing here imports
torch or grpc. Such an engine fills `workers.engine.Engine` too: lifecycle and tokenizing are alike for all kinds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from workers.engine import TextDelta


@dataclass(frozen=True, slots=True)
class TranscriptionRequest:
    """One recording to be written down.

    Attributes:
        audio: a whole file of any container, undecoded and untrusted.
        translate: write English whatever is spoken.
        language: of the speech, as a code ("en", "pt-BR") or a name; empty: find out.
        prompt: text to continue in style and spelling; empty for none.
        temperature: None or 0: greedy, warmer only where the result looks wrong; else sampled with exactly this.
        word_timestamps: segments carry their words.
        segment_timestamps: `Segment`s are sent beside the text.
        logprobs: text carries the logprobs of its tokens.
    """

    audio: bytes = field(repr=False)
    translate: bool = False
    language: str = ""
    prompt: str = field(default="", repr=False)
    temperature: float | None = None
    word_timestamps: bool = False
    segment_timestamps: bool = False
    logprobs: bool = False
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Word:
    """A word with the spaces before it, in seconds from the recording's beginning."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech; seconds from the recording's beginning. The numbers are those of OpenAI's verbose JSON."""

    id: int
    start_s: float
    end_s: float
    text: str
    token_ids: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, slots=True)
class TranscriptionFinish:
    """The last event.

    Attributes:
        language: a code.
        language_name: in English, lower case.
        duration_s: what the recording lasts.
        num_prompt_tokens: of the prompt, and positions of the encoder, 50 for each second of sound.
    """

    language: str
    language_name: str
    duration_s: float
    num_prompt_tokens: int
    num_completion_tokens: int


Heard = TextDelta | Segment | TranscriptionFinish


@runtime_checkable
class Transcriber(Protocol):
    """An engine that hears."""

    def transcribe(self, request: TranscriptionRequest) -> AsyncIterator[Heard]:
        """Serve one request: text as it is understood, in order, then one `TranscriptionFinish`.

        The texts joined are the whole transcript. A text comes before the segments that it is made of. Closing the
        iterator at any point frees what the request holds within one step.

        Raises:
            HostlerError: refused or failed; other requests are unaffected.
        """
