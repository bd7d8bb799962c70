"""The part of the fake worker that hears: it takes a file's bytes for what is said in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from hostler.channel import GENERATION_KEY, metadata_value
from hostler.errors import HostlerError, abort
from hostler.inference.v1 import hearing_pb2
from hostler.inference.v1 import inference_pb2 as pb


async def two_segments(request: pb.TranscribeRequest) -> AsyncIterator[pb.TranscribeResponse]:
    """Hear the file's bytes as text, in two segments; only what is asked for besides the text."""
    said = request.audio.data.decode("utf-8", errors="replace")
    half = len(said) // 2
    for index, part in enumerate((said[:half], said[half:])):
        logprobs = [pb.TokenLogprob(token_id=1, token=part.encode(), logprob=-0.5)] if request.logprobs else []
        yield pb.TranscribeResponse(text=pb.TextDelta(text=part, logprobs=logprobs))
        if request.segment_timestamps or request.word_timestamps:
            start_s = 3661.5 * index
            words = [hearing_pb2.Word(text=f" {part.strip()}", start_s=start_s, end_s=start_s + 1)]
            yield pb.TranscribeResponse(
                segment=hearing_pb2.Segment(
                    id=index,
                    start_s=start_s,
                    end_s=start_s + 1.25,
                    text=part,
                    token_ids=[5],
                    words=words if request.word_timestamps else [],
                )
            )
    usage = pb.Usage(num_prompt_tokens=50, num_completion_tokens=4)
    yield pb.TranscribeResponse(
        finish=pb.TranscribeFinish(language="en", language_name="english", duration_s=8.2, usage=usage)
    )


Hearing = Callable[[pb.TranscribeRequest], AsyncIterator[pb.TranscribeResponse]]


class Hears:
    """Answers Transcribe by `hearing`; the rest of the worker counts and remembers."""

    hearing: Hearing = staticmethod(two_segments)
    asked: list[Any]
    generation: int

    async def _count(self, step: int) -> None:
        raise NotImplementedError

    async def Transcribe(  # noqa: N802
        self, request: pb.TranscribeRequest, context: Any
    ) -> AsyncIterator[pb.TranscribeResponse]:
        self.asked.append(request)
        assert metadata_value(context, GENERATION_KEY) == str(self.generation)
        await self._count(1)
        try:
            async for event in self.hearing(request):
                yield event
        except HostlerError as error:
            await abort(context, error)
        finally:
            await asyncio.shield(self._count(-1))
