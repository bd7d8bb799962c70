"""A form for a transcription or translation → `TranscriptionCall`. Above: `routes.transcriptions`; below: `fields`.

Every field is honoured, known to be harmless, or refused by name; unknown ones are ignored. An empty field is an absent
one, as browsers send those that nobody filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import orjson
from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import hearing_pb2
from hostler.inference.v1 import inference_pb2 as pb

from gateway.fields import MAX_MODEL_CHARS, Fields, show
from gateway.multipart import Form
from gateway.terms import read_keep_alive_ms

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
_STREAMED = ("json", "text")
_GRANULARITIES = ("word", "segment")
_MAX_PROMPT_CHARS = 32_768
_MAX_TEMPERATURE = 1.0
_TRUE, _FALSE = ("true", "1", "on", "yes"), ("false", "0", "off", "no")
# They would change the answer and cannot be honoured.
_REFUSED = ("known_speaker_names", "known_speaker_references", "hotwords", "to_language")


@dataclass(frozen=True, slots=True)
class TranscriptionCall:
    """One validated request.

    Attributes:
        model: as the client wrote it.
        message: the contract's.
        format: one of `FORMATS`.
        words, segments: which times verbose JSON tells.
        stream: as events.
    """

    model: str
    message: pb.TranscribeRequest
    format: str
    words: bool
    segments: bool
    stream: bool

    @property
    def translates(self) -> bool:
        """English is wanted, whatever is spoken."""
        return self.message.task == hearing_pb2.TRANSCRIBE_TASK_TRANSLATE


def parse_transcription_form(form: Form, *, translate: bool) -> TranscriptionCall:
    """Validate a request.

    Raises:
        InvalidRequest: a field is missing or malformed; `param` names it.
        UnsupportedParameter: a field asks for something that would change the answer and that we cannot do.
    """
    reader = _FormFields(form.fields)
    for name in _REFUSED:
        if reader.values(name):
            raise UnsupportedParameter(f"'{name}' is not supported. Remove it from the request.", param=name)
    model = reader.text("model", MAX_MODEL_CHARS)
    if not model:
        raise InvalidRequest("You must provide a model parameter.", param="model")
    if not form.file:
        missing = "The file is empty." if form.file is not None else "You must provide a file: the part 'file'."
        raise InvalidRequest(missing, param="file")
    shape = reader.choice("response_format", FORMATS) or "json"
    granularities = [
        reader.checked(value, "timestamp_granularities[]", _GRANULARITIES) for value in reader.granularities()
    ]
    if granularities and shape != "verbose_json":
        raise InvalidRequest(
            "'timestamp_granularities[]' goes with response_format 'verbose_json' only.",
            param="timestamp_granularities[]",
        )
    logprobs = bool([reader.checked(value, "include[]", ("logprobs",)) for value in reader.values("include")])
    stream = reader.flag("stream")
    if stream and shape not in _STREAMED:
        raise UnsupportedParameter(f"'stream' does not go with response_format '{shape}'.", param="stream")
    if logprobs and shape != "json":
        raise UnsupportedParameter("'include[]' goes with response_format 'json' only.", param="include[]")
    words = "word" in granularities
    segments = not granularities or "segment" in granularities
    message = pb.TranscribeRequest(
        audio=pb.Media(data=form.file, mime_type=form.file_type, detail=form.file_name),
        task=hearing_pb2.TRANSCRIBE_TASK_TRANSLATE if translate else hearing_pb2.TRANSCRIBE_TASK_TRANSCRIBE,
        language=reader.text("language", 64),
        prompt=reader.text("prompt", _MAX_PROMPT_CHARS),
        temperature=reader.number("temperature", 0.0, _MAX_TEMPERATURE),
        word_timestamps=words,
        segment_timestamps=shape in ("verbose_json", "srt", "vtt"),
        logprobs=logprobs,
        keep_alive_ms=reader.keep_alive_ms(),
    )
    _check_chunking(reader)
    return TranscriptionCall(model, message, shape, words, segments, stream)


def _check_chunking(reader: _FormFields) -> None:
    """Take what asks for cutting at pauses, which is what is always done; its fine settings are the server's own."""
    text = reader.text("chunking_strategy", 4096)
    if not text or text == "auto":
        return
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict) or value.get("type") != "server_vad":
        raise InvalidRequest(
            f"Invalid 'chunking_strategy': {show(text)} is neither 'auto' nor an object of type 'server_vad'.",
            param="chunking_strategy",
        )
    if any(value.get(name) is not None for name in ("prefix_padding_ms", "silence_duration_ms", "threshold")):
        raise UnsupportedParameter(
            "'chunking_strategy' of type 'server_vad' takes no settings here; leave them out.",
            param="chunking_strategy",
        )


class _FormFields:
    """Reader of a form's fields. Lists come as `name[]`, and from some clients as `name`."""

    def __init__(self, fields: Mapping[str, list[str]]) -> None:
        self._fields = fields

    def values(self, name: str) -> list[str]:
        """Return every value of a list that is not empty."""
        return [value for key in (name, f"{name}[]") for value in self._fields.get(key, []) if value]

    def granularities(self) -> list[str]:
        """Return the granularities; some clients send one JSON list, or one text with commas."""
        found: list[str] = []
        for value in self.values("timestamp_granularities"):
            found += [part.strip(" \"'") for part in value.strip("[] ").split(",")]
        return [value for value in found if value]

    def text(self, name: str, max_chars: int) -> str:
        """Return the last value of a field; empty if absent."""
        value = (self._fields.get(name) or [""])[-1]
        return Fields({name: value}).string(name, max_chars) or ""

    def checked(self, value: str, name: str, allowed: tuple[str, ...]) -> str:
        """Return a value that must be one of `allowed`."""
        Fields({name: value}).choice(name, allowed)
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Return a field that must be one of `allowed`; empty if absent."""
        value = self.text(name, 256)
        return self.checked(value, name, allowed) if value else ""

    def flag(self, name: str) -> bool:
        """Return a true or false; false if absent."""
        value = self.text(name, 16).lower()
        if value and value not in (*_TRUE, *_FALSE):
            raise InvalidRequest(f"Invalid '{name}': {show(value)} is neither true nor false.", param=name)
        return value in _TRUE

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number within bounds; None if absent."""
        text = self.text(name, 64)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InvalidRequest(f"Invalid '{name}': {show(text)} is not a number.", param=name)
        return Fields({name: value}).number(name, low, high)

    def keep_alive_ms(self) -> int | None:
        """Return `keep_alive` as `read_keep_alive_ms` does, None if absent."""
        return read_keep_alive_ms(Fields({"keep_alive": self.text("keep_alive", 64) or None}))
