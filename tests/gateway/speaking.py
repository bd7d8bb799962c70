"""The part of the fake worker that speaks: its sound is bytes that spell the text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from hostler.channel import GENERATION_KEY, metadata_value
from hostler.errors import HostlerError, abort
from hostler.inference.v1 import speaking_pb2 as pb


async def two_sounds(request: pb.SpeakRequest) -> AsyncIterator[pb.SpeakResponse]:
    """Say the text in two halves."""
    half = len(request.text) // 2
    for part in (request.text[:half], request.text[half:]):
        yield pb.SpeakResponse(audio=part.encode())
    yield pb.SpeakResponse(finish=pb.SpeakFinish(num_symbols=3, num_frames=40, duration_s=0.5))


Speech = Callable[[pb.SpeakRequest], AsyncIterator[pb.SpeakResponse]]


class Speaks:
    """Answers Speak by `speech`; the rest of the worker counts and remembers."""

    speech: Speech = staticmethod(two_sounds)
    asked: list[Any]
    generation: int

    async def _count(self, step: int) -> None:
        raise NotImplementedError

    async def Speak(self, request: pb.SpeakRequest, context: Any) -> AsyncIterator[pb.SpeakResponse]:  # noqa: N802
        self.asked.append(request)
        assert metadata_value(context, GENERATION_KEY) == str(self.generation)
        await self._count(1)
        try:
            async for event in self.speech(request):
                yield event
        except HostlerError as error:
            await abort(context, error)
        finally:
            await asyncio.shield(self._count(-1))
