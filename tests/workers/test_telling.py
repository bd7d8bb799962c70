"""Beside a device that runs ahead, text is made while the next step runs: in order, whole, whatever the reply."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hostler.errors import Internal

from tests.workers.test_text_engine import random_prompts, reference
from workers import ending
from workers.engine import Finish, GenerationRequest, LoadSpec, SamplingParams, TextDelta, TokenPrompt
from workers.text.eager import ModelRunner, open_eager
from workers.text.engine import TextEngine
from workers.text.loader import load
from workers.text.lookup import Lookup
from workers.text.reply import Reply
from workers.text.scheduler import Step


class Ahead:
    """A runner that tells when a step is begun, as one does that leaves the rest to its device."""

    name = "ahead"
    runs_ahead = True

    def __init__(self, inner: ModelRunner, told: list[str]) -> None:
        self._inner = inner
        self._told = told

    def run(self, step: Step) -> torch.Tensor:
        logits = self._inner.run(step)
        self._told.append("begun")
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@asynccontextmanager
async def opened(path: Path, told: list[str]) -> AsyncIterator[TextEngine]:
    spec = LoadSpec(model="tiny", path=str(path), dtype="float32", num_threads=1, max_running=8)
    loaded = load(spec, lambda *_: None)
    engine = TextEngine(loaded, spec, Ahead(open_eager(loaded, spec), told))  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        await engine.close()


def asking(prompt: tuple[int, ...], max_tokens: int, **fields: Any) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    return GenerationRequest(TokenPrompt(prompt), sampling=sampling, max_tokens=max_tokens, **fields)


async def said_by(engine: TextEngine, prompt: tuple[int, ...], max_tokens: int, **fields: Any) -> tuple[str, Finish]:
    text = ""
    async for event in engine.generate(asking(prompt, max_tokens, **fields)):
        if isinstance(event, Finish):
            return text, event
        assert isinstance(event, TextDelta)
        text += event.text
    raise AssertionError("no finish")


async def test_a_token_is_told_once_the_next_step_is_begun_and_the_last_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    (prompt,) = random_prompts(1, 900, 20)
    accept = Reply.accept

    def noted(self: Reply, token_id: int, **named: Any) -> list[Any]:
        told.append("told")
        return accept(self, token_id, **named)

    monkeypatch.setattr(Reply, "accept", noted)
    monkeypatch.setattr(Lookup, "guess", lambda _: ())  # drafted tokens are told at once
    async with opened(tiny_model, told) as engine:
        text, finish = await said_by(engine, prompt, 5)
        assert text == await engine.detokenize(reference(tiny_model, prompt, 5))
    assert finish.num_completion_tokens == 5
    # The prompt's step is the first; each token waits for the next step's beginning, the last is told when it is there.
    assert told == ["begun", *["begun", "told"] * 4, "told"]


async def test_replies_of_every_kind_in_one_batch_are_what_they_were(tiny_model: Path) -> None:
    prompts = random_prompts(6, 900, 30)
    async with opened(tiny_model, []) as engine:

        async def text(index: int, **fields: Any) -> tuple[str, str]:
            said, finish = await said_by(engine, prompts[index], 16, **fields)
            return said, finish.reason

        alone = [await text(index) for index in range(6)]
        stop = alone[1][0][3:6]
        plain, stopped, scored, *others = await asyncio.gather(
            text(0), text(1, stop=(stop,)), text(2, top_logprobs=3), *(text(index) for index in range(3, 6))
        )
        assert plain == alone[0]
        assert stopped == (alone[1][0][: alone[1][0].index(stop)], "stop")
        assert scored == alone[2]
        assert others == alone[3:]


async def test_a_fault_in_one_replys_text_stays_its_own(tiny_model: Path) -> None:
    prompts = random_prompts(2, 900, 20)
    async with opened(tiny_model, []) as engine:

        async def spoiled() -> None:
            async for _ in engine.generate(asking(prompts[0], 40)):
                ours = [s for s in engine._queues if tuple(s.token_ids[: len(prompts[0])]) == prompts[0]]
                ours[0].reply._detokenizer = None  # type: ignore[assignment]

        other = asyncio.create_task(said_by(engine, prompts[1], 40))
        with pytest.raises(Internal):
            await spoiled()
        expected = await engine.detokenize(reference(tiny_model, prompts[1], 40))
        assert (await other)[0] == expected
        assert (await said_by(engine, prompts[1], 40))[0] == expected


async def test_an_engine_whose_loop_breaks_takes_its_worker_with_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(ending, "end_process", reasons.append)
    async with opened(tiny_model, []) as engine:
        monkeypatch.setattr(engine._scheduler, "schedule", lambda: 1 / 0)
        asked = asyncio.create_task(said_by(engine, (1, 2, 3), 2))
        while not reasons:
            await asyncio.sleep(0.01)
        asked.cancel()
    assert reasons == ["engine failed: ZeroDivisionError"]
