"""Between the wire and the dataclasses, for speech that is written down. Pure; beside `translate.py`."""

from __future__ import annotations

from hostler.errors import InvalidRequest
from hostler.inference.v1 import hearing_pb2
from hostler.inference.v1 import inference_pb2 as pb

from workers.engine import TextDelta, TokenLogprob
from workers.transcription import Heard, Segment, TranscriptionRequest

_MAX_TEMPERATURE = 2.0


def transcription_request(message: pb.TranscribeRequest, request_id: str) -> TranscriptionRequest:
    """Return the engine's form of a request.

    Raises:
        InvalidRequest: no recording, or an impossible temperature.
    """
    if not message.audio.data:
        raise InvalidRequest("The file is empty.", param="file")
    temperature = message.temperature if message.HasField("temperature") else None
    if temperature is not None and not 0.0 <= temperature <= _MAX_TEMPERATURE:
        raise InvalidRequest(f"Invalid 'temperature': {temperature} is not between 0 and 2.", param="temperature")
    return TranscriptionRequest(
        audio=message.audio.data,
        translate=message.task == hearing_pb2.TRANSCRIBE_TASK_TRANSLATE,
        language=message.language,
        prompt=message.prompt,
        temperature=temperature,
        word_timestamps=message.word_timestamps,
        segment_timestamps=message.segment_timestamps,
        logprobs=message.logprobs,
        request_id=request_id,
    )


def transcribe_response(event: Heard) -> pb.TranscribeResponse:
    """Return the wire's form of an event."""
    if isinstance(event, TextDelta):
        logprobs = [_logprob(item) for item in event.logprobs]
        return pb.TranscribeResponse(text=pb.TextDelta(text=event.text, logprobs=logprobs))
    if isinstance(event, Segment):
        return pb.TranscribeResponse(
            segment=hearing_pb2.Segment(
                id=event.id,
                start_s=event.start_s,
                end_s=event.end_s,
                text=event.text,
                token_ids=event.token_ids,
                temperature=event.temperature,
                avg_logprob=event.avg_logprob,
                compression_ratio=event.compression_ratio,
                no_speech_prob=event.no_speech_prob,
                words=[
                    hearing_pb2.Word(text=word.text, start_s=word.start_s, end_s=word.end_s) for word in event.words
                ],
            )
        )
    return pb.TranscribeResponse(
        finish=pb.TranscribeFinish(
            language=event.language,
            duration_s=event.duration_s,
            usage=pb.Usage(
                num_prompt_tokens=event.num_prompt_tokens, num_completion_tokens=event.num_completion_tokens
            ),
            language_name=event.language_name,
        )
    )


def _logprob(item: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=item.token_id, token=item.token, logprob=item.logprob)
