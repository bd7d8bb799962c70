"""Worker answers → OpenAI's events of a speech that is streamed. Above: `routes.speech`; below: `sse`."""

from __future__ import annotations

import base64

from hostler.inference.v1 import speaking_pb2 as pb

from gateway.sse import data_frame


def speech_frames(event: pb.SpeakResponse) -> bytes:
    """Return the events of one answer: a delta where it has audio, and last `speech.audio.done` with the usage.

    Tokens are what the model counts in: symbols of the text in, frames of sound out.
    """
    frames = b""
    if event.audio:
        audio = base64.b64encode(event.audio).decode("ascii")
        frames += data_frame({"type": "speech.audio.delta", "audio": audio})
    if event.HasField("finish"):
        num_in, num_out = event.finish.num_symbols, event.finish.num_frames
        told = {"input_tokens": num_in, "output_tokens": num_out, "total_tokens": num_in + num_out}
        frames += data_frame({"type": "speech.audio.done", "usage": told})
    return frames
