"""Between the wire and the dataclasses, for speech that is made. Pure; beside `translate.py`."""

from __future__ import annotations

from hostler.inference.v1 import speaking_pb2 as pb

from workers.utterances import SAMPLE_RATE_HZ, AudioBytes, SpeechEvent, SpeechRequest


def speech_request(message: pb.SpeakRequest, request_id: str) -> SpeechRequest:
    """Return the engine's form of a request."""
    return SpeechRequest(
        text=message.text,
        voice=message.voice,
        format=message.format,
        speed=message.speed if message.HasField("speed") else 1.0,
        instructions=message.instructions,
        request_id=request_id,
    )


def speak_response(event: SpeechEvent, *, is_first: bool) -> pb.SpeakResponse:
    """Return the wire's form of an event."""
    if isinstance(event, AudioBytes):
        return pb.SpeakResponse(audio=event.data, sample_rate_hz=SAMPLE_RATE_HZ if is_first else 0)
    finish = pb.SpeakFinish(num_symbols=event.num_symbols, num_frames=event.num_frames, duration_s=event.duration_s)
    return pb.SpeakResponse(finish=finish)
