"""What a worker heard → JSON, text, SubRip, WebVTT or events. Above: `routes.transcriptions`; below: `sse`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from hostler.inference.v1 import hearing_pb2
from hostler.inference.v1 import inference_pb2 as pb
from starlette.responses import Response

from gateway.dialects.openai_transcriptions.request import TranscriptionCall
from gateway.json_response import json_response
from gateway.sse import data_frame

_ARROW = " --> "


class Transcript:
    """Gathers a worker's events."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.segments: list[hearing_pb2.Segment] = []
        self.finish = pb.TranscribeFinish()

    def add(self, event: pb.TranscribeResponse) -> str:
        """Take one event; return the text that it brings."""
        if event.HasField("text"):
            self._texts.append(event.text.text)
            self.logprobs += [logprob_object(item) for item in event.text.logprobs]
            return event.text.text
        if event.HasField("segment"):
            self.segments.append(event.segment)
        elif event.HasField("finish"):
            self.finish = event.finish
        return ""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._texts).strip()


def response_of(transcript: Transcript, call: TranscriptionCall) -> Response:
    """Return the whole reply in the format that was asked for."""
    if call.format == "text":
        return Response(f"{transcript.text}\n", media_type="text/plain; charset=utf-8")
    if call.format == "srt":
        return Response(subrip(transcript.segments), media_type="application/x-subrip; charset=utf-8")
    if call.format == "vtt":
        return Response(webvtt(transcript.segments), media_type="text/vtt; charset=utf-8")
    if call.format == "verbose_json":
        return json_response(verbose_object(transcript, call))
    body: dict[str, Any] = {"text": transcript.text}
    if call.message.logprobs:
        body["logprobs"] = transcript.logprobs
    return json_response({**body, "usage": duration_usage(transcript.finish)})


def verbose_object(transcript: Transcript, call: TranscriptionCall) -> dict[str, Any]:
    """Return OpenAI's verbose object; words and segments as they were asked for."""
    finish = transcript.finish
    body: dict[str, Any] = {
        "task": "translate" if call.translates else "transcribe",
        "language": "english" if call.translates else finish.language_name or finish.language,
        "duration": round(finish.duration_s, 3),
        "text": transcript.text,
    }
    if call.words:
        body["words"] = [
            {"word": word.text.strip(), "start": round(word.start_s, 3), "end": round(word.end_s, 3)}
            for segment in transcript.segments
            for word in segment.words
        ]
    if call.segments:
        body["segments"] = [segment_object(segment) for segment in transcript.segments]
    return {**body, "usage": duration_usage(finish)}


def segment_object(segment: hearing_pb2.Segment) -> dict[str, Any]:
    """Return one segment; `seek` is where it begins, in hundredths of a second."""
    return {
        "id": segment.id,
        "seek": int(segment.start_s * 100),
        "start": round(segment.start_s, 3),
        "end": round(segment.end_s, 3),
        "text": segment.text,
        "tokens": list(segment.token_ids),
        "temperature": round(segment.temperature, 3),
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }


def logprob_object(item: pb.TokenLogprob) -> dict[str, Any]:
    """Return a token's text, bytes and logprob."""
    return {"token": item.token.decode("utf-8", errors="replace"), "bytes": list(item.token), "logprob": item.logprob}


def duration_usage(finish: pb.TranscribeFinish) -> dict[str, Any]:
    """Return the usage of a model that is counted by time: whole seconds begun."""
    return {"type": "duration", "seconds": math.ceil(finish.duration_s)}


def subrip(segments: Iterable[hearing_pb2.Segment]) -> str:
    """Return SubRip subtitles."""
    return "".join(
        f"{number}\n{_clock(segment.start_s, ',')}{_ARROW}{_clock(segment.end_s, ',')}\n{_line(segment.text)}\n\n"
        for number, segment in enumerate(segments, start=1)
    )


def webvtt(segments: Iterable[hearing_pb2.Segment]) -> str:
    """Return WebVTT subtitles."""
    cues = (
        f"{_clock(segment.start_s, '.')}{_ARROW}{_clock(segment.end_s, '.')}\n{_line(segment.text)}\n\n"
        for segment in segments
    )
    return "WEBVTT\n\n" + "".join(cues)


def _line(text: str) -> str:
    # An arrow or an empty line in the text would end the cue.
    return " ".join(text.split()).replace("-->", "->")


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def delta_frame(text: str, logprobs: list[dict[str, Any]], *, wants_logprobs: bool) -> bytes:
    """Return the event of new text."""
    event: dict[str, Any] = {"type": "transcript.text.delta", "delta": text}
    return data_frame({**event, "logprobs": logprobs} if wants_logprobs else event)


def done_frame(transcript: Transcript, *, wants_logprobs: bool) -> bytes:
    """Return the last event: all text, and the usage, which in a stream OpenAI counts in tokens."""
    event: dict[str, Any] = {"type": "transcript.text.done", "text": transcript.text}
    if wants_logprobs:
        event["logprobs"] = transcript.logprobs
    usage = transcript.finish.usage
    num_in, num_out = usage.num_prompt_tokens, usage.num_completion_tokens
    told = {"type": "tokens", "input_tokens": num_in, "output_tokens": num_out, "total_tokens": num_in + num_out}
    return data_frame({**event, "usage": told})
