"""A speech body → `SpeechCall`. Above: `routes.speech`; below: `fields`, `terms`.

Every field is honoured, known to be harmless, or refused by name; unknown ones are ignored. `null` means absent. What
only some models can do (voices, instructions) is judged by the worker, which knows its model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hostler.errors import InvalidRequest
from hostler.inference.v1 import speaking_pb2 as pb

from gateway.fields import Fields
from gateway.terms import read_keep_alive_ms

MAX_CHARACTERS = 4096
"""OpenAI's."""
MIN_SPEED, MAX_SPEED = 0.25, 4.0
"""OpenAI's."""
_MAX_VOICE_CHARACTERS = 256

MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
"""Formats, and what their replies are called. Opus comes in Ogg, whose type is this one (RFC 7845)."""


@dataclass(frozen=True, slots=True)
class SpeechCall:
    """One validated request.

    Attributes:
        model: as the client wrote it.
        voice: empty for the model's own choice.
        as_events: server-sent events, else plain bytes.
    """

    model: str
    text: str = field(repr=False)
    voice: str
    format: str
    speed: float | None
    instructions: str = field(repr=False)
    as_events: bool
    keep_alive_ms: int | None

    @property
    def media_type(self) -> str:
        """Of the audio."""
        return MEDIA_TYPES[self.format]

    def message(self) -> pb.SpeakRequest:
        """Return the contract's message."""
        return pb.SpeakRequest(
            text=self.text,
            voice=self.voice,
            format=self.format,
            speed=self.speed,
            instructions=self.instructions,
            keep_alive_ms=self.keep_alive_ms,
        )


def parse_speech_request(body: dict[str, object]) -> SpeechCall:
    """Validate a request.

    Raises:
        InvalidRequest: a field is missing, of the wrong type or out of bounds; `param` names it.
    """
    fields = Fields(body)
    model = fields.model()
    text = fields.string("input", MAX_CHARACTERS)
    if text is None:
        raise fields.missing("input")
    if not text.strip():
        raise InvalidRequest("Invalid 'input': there is nothing to say in it.", param="input")
    return SpeechCall(
        model=model,
        text=text,
        voice=_voice(fields),
        format=fields.choice("response_format", tuple(MEDIA_TYPES)) or "mp3",
        speed=fields.number("speed", MIN_SPEED, MAX_SPEED),
        instructions=fields.string("instructions", MAX_CHARACTERS) or "",
        as_events=fields.choice("stream_format", ("audio", "sse")) == "sse",
        keep_alive_ms=read_keep_alive_ms(fields),
    )


def _voice(fields: Fields) -> str:
    """Return the voice's name, which may stand in an object of its own."""
    if not isinstance(fields.raw("voice"), dict):
        return fields.string("voice", _MAX_VOICE_CHARACTERS) or ""
    named = fields.required_child("voice")
    name = named.string("id", _MAX_VOICE_CHARACTERS)
    if not name:
        raise named.missing("id")
    return name
